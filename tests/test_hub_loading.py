"""Loading: a model folder in the hub's own format goes in; the right numbers come out, or one line says why not."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenizers
import torch
from hub_files import (
    BROKEN_JSON,
    CPU,
    TINY,
    Hub,
    assert_holds,
    byte_tokenizer,
    free_memory,
    make_folder,
    make_tensors,
    refusal,
    without,
    write_json,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, tqdm
from in_process import said

from minihogwild import Config, LayerKind, Rope, Run, generate, load
from minihogwild.errors import allocating
from minihogwild.hub import checkpoint
from minihogwild.hub.loading import choose_device, fetch, fetch_config
from minihogwild.prompts import Prompts, prompts_of


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with nothing wrong."""
    return make_folder(tmp_path / "tiny-model", TINY, make_tensors(TINY))


# ---- whole folders


def test_a_tilde_is_the_home_folder(tiny: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert load("~/tiny-model", device="cpu").folder == tiny


def test_a_folder_in_one_file(tiny: Path):
    model = load(tiny, device="cpu")
    assert model.config == Config(
        vocab_size=260,
        hidden_size=12,
        intermediate_size=20,
        layer_kinds=(LayerKind(), LayerKind()),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope=Rope("default", rope_theta=50000.0),
    )
    assert_holds(model.weights, make_tensors(TINY), TINY)
    assert (model.dtype, model.device, model.folder) == (torch.float32, CPU, tiny)
    assert model.name == str(tiny)
    assert model.tokenizer.decode(model.tokenizer.encode("As written: naïve ☕")) == "As written: naïve ☕"


def test_a_folder_is_found_by_a_relative_path(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.parent)
    by_name, by_path = load(tiny.name, device="cpu"), load(Path(tiny.name), device="cpu")
    assert_holds(by_name.weights, make_tensors(TINY), TINY)
    assert_holds(by_path.weights, make_tensors(TINY), TINY)


def test_fetch_knows_the_home_folder_too(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Who asks for the folder first, and then loads from it, must not be told another one."""
    monkeypatch.setenv("HOME", str(tiny.parent))
    Hub(monkeypatch, AssertionError("a local folder must not be looked up"))
    assert fetch("~/tiny-model") == tiny
    assert load("~/tiny-model", device="cpu", folder=fetch("~/tiny-model")).name == "~/tiny-model"


def test_a_folder_that_has_been_fetched_is_not_looked_up_again(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, AssertionError("it must not be looked up"))
    model = load("someone/tiny-model", device="cpu", folder=tiny)
    assert (model.name, model.folder) == ("someone/tiny-model", tiny)


def test_without_its_tokenizer_a_model_is_config_json_and_weights_alone(tiny: Path):
    """Replay and compare need no text; nor do the models that others write for them."""
    for path in tiny.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    model = load(tiny, device="cpu", with_tokenizer=False)
    assert model.tokenizer is None
    assert_holds(model.weights, make_tensors(TINY), TINY)
    assert "tokenizer.json" in refusal(load, tiny, device="cpu")


def test_without_its_tokenizer_nothing_of_it_is_read(tiny: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tiny / name).write_bytes(b"\xff broken")
    assert load(tiny, device="cpu", with_tokenizer=False).tokenizer is None


# ---- dtype and device

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype(tmp_path: Path, name: str, stored: torch.dtype):
    config = TINY | {"model_type": "qwen2"}
    saved = make_tensors(config, biases=True, qk_norms=True, dtype=stored)
    folder = make_folder(tmp_path, config, saved)
    for given_dtype in (name, DTYPES[name]):
        model = load(folder, dtype=given_dtype, device="cpu")
        assert model.dtype == DTYPES[name]
        assert_holds(model.weights, saved, config, DTYPES[name])  # every single tensor has it


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_auto_dtype_is_the_one_in_config_json(tmp_path: Path, key: str, name: str):
    """Whatever the tensors are stored in."""
    config = without(TINY, "torch_dtype") | {key: name}
    saved = make_tensors(config, dtype=torch.float16 if name == "float64" else torch.float64)
    folder = make_folder(tmp_path, config, saved)
    assert_holds(load(folder, device="cpu").weights, saved, config, DTYPES[name])


@pytest.mark.parametrize("silence", [{}, {"torch_dtype": None}], ids=["absent", "null"])
def test_auto_dtype_is_the_checkpoints_own_where_config_json_is_silent(tmp_path: Path, silence: dict):
    config = without(TINY, "torch_dtype") | silence
    for name in ("float32", "bfloat16", "float16", "float64"):
        saved = make_tensors(config, dtype=getattr(torch, name))
        assert load(make_folder(tmp_path / name, config, saved), device="cpu").dtype == getattr(torch, name)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_what_config_json_calls_a_dtype(tmp_path: Path, key: str):
    """`auto` leaves it to the checkpoint; PyTorch has short names, and puts its own before the long ones."""
    stored = make_tensors(TINY, dtype=torch.bfloat16)
    names = {"auto": torch.bfloat16, "half": torch.float16, "double": torch.float64, "torch.float32": torch.float32}
    for name, dtype in names.items():
        config = without(TINY, "torch_dtype") | {key: name}
        assert load(make_folder(tmp_path / name, config, stored), device="cpu").dtype == dtype
    for wrong in ("fp16", "int8", "Tensor", "float8_e4m3fn"):
        folder = make_folder(tmp_path / wrong, without(TINY, "torch_dtype") | {key: wrong}, stored)
        message = refusal(load, folder, device="cpu")
        assert message.startswith(f"config.json: {key} {wrong!r} is not supported: use --dtype")
        assert load(folder, dtype="float32", device="cpu").dtype == torch.float32


def test_an_adapter_beside_a_model_is_told(tiny: Path, caplog):
    """Some writers save both; transformers has taken the one, the other, or both together."""
    load(tiny, device="cpu")
    assert not caplog.records
    write_json(tiny / "adapter_config.json", {"peft_type": "LORA"})
    load(tiny, device="cpu")
    assert [record.getMessage() for record in caplog.records] == ["adapter_config.json: the adapter is not applied"]


def test_an_unknown_dtype_is_refused_by_name(tiny: Path):
    message = refusal(load, tiny, dtype="int8", device="cpu")
    assert "'int8'" in message
    assert all(name in message for name in DTYPES)
    write_json(tiny / "config.json", TINY | {"torch_dtype": "float8_e4m3fn"})
    assert "'float8_e4m3fn'" in refusal(load, tiny, device="cpu")


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_device(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: int, chosen: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert choose_device("auto") == torch.device(chosen)
    assert choose_device("cpu") == choose_device(CPU) == CPU


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch, device: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.split(":")[0] in refusal(load, tiny, device=device)


# ---- broken folders

CUT_TOKENIZER = byte_tokenizer().to_str()[:-40]


@pytest.mark.parametrize("how", BROKEN_JSON)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json_names_its_file(tiny: Path, name: str, how: str):
    (tiny / name).write_bytes(BROKEN_JSON[how])
    assert name in refusal(load, tiny, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tiny: Path, name: str):
    (tiny / name).unlink()
    message = refusal(load, tiny, device="cpu")
    assert name in message
    assert str(tiny) in message
    assert "JSON" not in message  # missing is not broken


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_files_that_need_not_be_there(tiny: Path, name: str):
    (tiny / name).unlink(missing_ok=True)
    assert_holds(load(tiny, device="cpu").weights, make_tensors(TINY), TINY)


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "model": {"type": "Nonesuch"}}', CUT_TOKENIZER])
def test_a_tokenizer_that_cannot_be_read_is_named(tiny: Path, content: str):
    (tiny / "tokenizer.json").write_text(content, "utf-8")
    assert "tokenizer.json" in refusal(load, tiny, device="cpu")


def test_a_tokenizer_of_a_newer_version(tiny: Path):
    """What the library says of it names neither the part nor the library."""
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    write_json(tiny / "tokenizer.json", tokenizer | {"pre_tokenizer": {"type": "NotYetInvented"}})
    message = refusal(load, tiny, device="cpu")
    assert f"tokenizers {tokenizers.__version__} cannot, which a newer version may: " in message
    assert "did not match any variant" in message


# ---- the hub

NEEDED = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
    "chat_template.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
}
NOT_NEEDED = {
    ".gitattributes",
    "LICENSE",
    "README.md",
    "USE_POLICY.md",
    "config.json.md",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "flax_model.msgpack",
    "merges.txt",
    "onnx/config.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/tokenizer.json",
    "openvino/openvino_model.bin",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "runs/events.out.tfevents.1",
    "tf_model.h5",
    "tokenizer.model",
    "training_args.bin",
    "vocab.json",
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which no name is a folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_a_hub_repository(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, tiny)
    model = load("someone/tiny-model", device="cpu")
    assert model.name == "someone/tiny-model"
    assert model.folder == tiny
    assert_holds(model.weights, make_tensors(TINY), TINY)
    [(repo_id, options)] = hub.calls
    assert repo_id == "someone/tiny-model"
    # Nothing that would overrule the user's own settings: cache folder, offline mode, token
    assert options.keys() == {"allow_patterns", "tqdm_class"}
    assert issubclass(options["tqdm_class"], tqdm)  # nor whether progress bars are wanted


def test_no_progress_bar_stays_open(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub leaves some, which would be drawn again when they are collected, wherever the cursor is by then."""
    terminal, bars = io.StringIO(), []
    terminal.isatty = lambda: True

    def download(_, tqdm_class: type, **options) -> str:
        bars.append(tqdm_class(total=7, file=terminal))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda name: [])
    load("someone/tiny-model", device="cpu")
    assert "0/7" in terminal.getvalue()
    drawn = terminal.getvalue()
    bars[0].close()
    assert terminal.getvalue() == drawn  # it was closed already,
    assert drawn.split("\r")[-2].strip() == ""  # and has left nothing behind


def test_only_the_files_needed_are_downloaded(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, tiny)
    load("someone/tiny-model", device="cpu")
    patterns = hub.calls[0][1]["allow_patterns"]
    kept = set(filter_repo_objects(sorted(NEEDED | NOT_NEEDED), allow_patterns=patterns))
    assert kept == NEEDED
    one_file = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"]
    assert list(filter_repo_objects(one_file, allow_patterns=patterns)) == [one_file[0], one_file[1], one_file[3]]
    assert any(fnmatch.fnmatch("prompts.json", pattern) for pattern in patterns)  # a model's own words


def test_a_repository_name_without_an_owner(tiny: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, tiny)
    assert load("tiny-model", device="cpu").folder == tiny
    assert [repo_id for repo_id, _ in hub.calls] == ["tiny-model"]


def test_a_local_folder_comes_before_the_hub(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, AssertionError("a local folder must not be looked up"))
    monkeypatch.chdir(tiny.parent.parent)
    assert load(f"{tiny.parent.name}/{tiny.name}", device="cpu").name == f"{tiny.parent.name}/{tiny.name}"
    assert hub.calls == []


@pytest.mark.parametrize(
    "name",
    [
        "./model",
        "../model",
        "models/mine/tiny",
        "/nowhere/at/all",
        "/nowhere",
        "~/no/such/model",
        "~no-such-user-here/model",
        "~no-such-user-here",
        "someone/tiny-model/",
        "someone/tiny-model@main",
        "someone/tiny-model-GGUF:Q4_K_M",
        "https://huggingface.co/someone/tiny-model",
        "someone\\tiny-model",
        " ",
    ],
)
def test_what_looks_local_never_reaches_the_hub(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """The hub's own client sees that it is no repository's name."""
    monkeypatch.setattr("socket.socket.connect", None)
    message = refusal(load, name, device="cpu")
    assert message.startswith(f"{name}: neither a folder")
    assert "no such folder is here" in message or "home directory" in message


def test_a_file_is_no_folder(tiny: Path):
    for path in (tiny / "model.safetensors", tiny / "config.json"):
        for asked in (load, fetch_config):
            assert f"{path}: neither a folder" in (message := refusal(asked, str(path)))
            assert "it is a file: give the folder that it lies in" in message


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_folder_is_not_taken_for_a_repositorys_name(tmp_path: Path, kind: str, monkeypatch):
    Hub(monkeypatch, AssertionError("it must not be looked up"))
    path = tmp_path / "model"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    assert "what has that name here is no folder, nor a link to one" in refusal(load, str(path))


def test_no_name_is_not_the_current_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """`--model "$MODEL"`, where no such variable is set."""
    monkeypatch.chdir(tiny)
    assert load(".", device="cpu").folder == Path(".")
    for asked in (load, fetch_config):
        assert "its name is empty" in refusal(asked, "")


class RepositoryNotFoundError(OSError):
    """The hub's own takes an HTTP response, whose library changes from version to version."""


class GatedRepoError(RepositoryNotFoundError):
    pass


URL = "https://huggingface.co/api/models/someone/tiny-model/revision/main"
HUB_ERRORS = {
    "unknown": (
        RepositoryNotFoundError(
            f"404 Client Error. (Request ID: Root=1-6a; 77)\n\nRepository Not Found for url: {URL}.\n"
            "Please make sure you specified the correct `repo_id` and `repo_type`."
        ),
        "no such repository",
    ),
    "gated": (
        GatedRepoError(
            f"401 Client Error. (Request ID: Root=1-6a; 77)\n\nCannot access gated repo for url {URL}.\n"
            "Access to model someone/tiny-model is restricted. You must be authenticated to access it."
        ),
        "gated",
    ),
    "offline": (
        LocalEntryNotFoundError(
            "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and "
            "outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass "
            "'local_files_only=False' as input."
        ),
        "the hub cannot be reached",
    ),
    "no network": (ConnectionError("Name or service not known\n(caused by something)"), "Name or service not known"),
    "a bad name": (ValueError("Repo id must use alphanumeric chars"), "Repo id must use alphanumeric chars"),
    "forbidden": (OSError("\n\n403 Forbidden: no.\nCannot access content at: there."), "403 Forbidden"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_hub_errors_become_one_line_that_says_why(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    error, reason = HUB_ERRORS[case]
    hub = Hub(monkeypatch, error)
    message = refusal(load, "someone/tiny-model", device="cpu")
    assert message.startswith("someone/tiny-model: ")
    assert "hub" in message
    assert reason in message
    assert len(hub.calls) == 1


def test_a_hub_error_without_a_message_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, TimeoutError())
    assert "TimeoutError" in refusal(load, "someone/tiny-model", device="cpu")


def test_an_interrupted_download_stays_an_interrupt(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("someone/tiny-model", device="cpu")


def test_the_hub_s_own_cache_and_offline_mode(tmp_path: Path):
    """With the real hub client: what is in the user's cache is found offline, what isn't gives the one line."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny-model"
    make_folder(cached / "snapshots" / revision, TINY, make_tensors(TINY))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    program = (
        "import minihogwild\n"
        "print(minihogwild.load('someone/tiny-model', device='cpu').folder)\n"
        "try: minihogwild.load('someone/absent', device='cpu')\n"
        "except minihogwild.InputError as error: print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == str(cached / "snapshots" / revision)
    assert refused.startswith("someone/absent: ")


# ---- memory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("bfloat16", 2)])
def test_the_memory_asked_for_is_that_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, dtype: str, size: int
):
    asked = []

    def asking(nbytes, what, device):
        asked.append((nbytes, what, device))
        return allocating(nbytes, what, device)

    monkeypatch.setattr(checkpoint, "allocating", asking)
    config = TINY | {"tie_word_embeddings": tied}
    saved = make_tensors(config)
    load(make_folder(tmp_path / "tiny-model", config, saved), dtype=dtype, device="cpu")
    [(nbytes, what, device)] = asked
    assert nbytes == size * sum(tensor.numel() for tensor in saved.values())
    assert "tiny-model" in what
    assert dtype in what
    assert device == CPU


def test_a_model_too_large_for_memory_is_refused_before_it_is_allocated(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    free_memory(monkeypatch, 1000)
    message = refusal(load, tiny, device="cpu")
    assert "memory" in message
    assert "tiny-model" in message
    assert "float32" in message
    free_memory(monkeypatch, 10**9)
    load(tiny, device="cpu")


def test_a_hub_model_too_large_for_memory_goes_by_its_name(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    """A snapshot's folder is named by a hash, which tells nobody anything."""
    snapshot = make_folder(tmp_path / "0123456789abcdef0123456789abcdef01234567", TINY, make_tensors(TINY))
    Hub(monkeypatch, snapshot)
    free_memory(monkeypatch, 1000)
    assert "tiny-model" in refusal(load, "someone/tiny-model", device="cpu")


# ---- the tokenizer and the embedding


def folder_with_added(tmp_path: Path, added: list[str], **config) -> Path:
    """The tiny model, with tokens added to its tokenizer's 259."""
    config = TINY | {"vocab_size": 259} | config
    folder = make_folder(tmp_path, config, make_tensors(config))
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_added_ids_past_the_embedding_that_nobody_feeds(tmp_path: Path):
    """Many a Llama 2 has a [PAD] that its embedding lacks."""
    model = load(folder_with_added(tmp_path, ["[PAD]", "[MORE]"]), device="cpu")
    assert model.tokenizer.size == 259
    assert len(model.tokenizer.texts) == 259
    assert max(model.tokenizer.without_text) < 259
    assert model.tokenizer.encode("hi") == byte_tokenizer().encode("hi").ids
    run = Run(model, "hi", 2, max_steps=3, prompts=Prompts(together="{problem}", names=("A", "B"), boxed=False))
    list(run)
    assert run.forward_steps == 3


def test_an_id_past_the_embedding_that_is_fed_is_named(tmp_path: Path):
    folder = folder_with_added(tmp_path, ["[PAD]"])
    (folder / "chat_template.jinja").write_text("[PAD]{{ messages[0].content }}")
    model = load(folder, device="cpu")
    run = Run(model, "hi", 1, max_steps=3)
    assert "token 259 is outside the vocabulary of 259" in refusal(list, run)


def test_ids_past_the_embedding_that_text_may_give_are_refused(tmp_path: Path):
    message = refusal(load, folder_with_added(tmp_path, [], vocab_size=200), device="cpu")
    assert "tokenizer.json: 259 ids, more than config.json's vocab_size 200" in message


IN_PLACE_OF = {  # by the missing file: others, and what the one line says of them
    "config.json": {
        "adapter_config.json": "merge it into the one that it was made for",
        "snapshots/0123/config.json": "that folder is the model's",
        "checkpoint-500/config.json": "such a folder is a model's",
        "model-Q4_K_M.gguf": "a copy of the model in safetensors",
        "params.json": "a copy of the model in safetensors",
    },
    "model.safetensors": {
        "pytorch_model.bin": "convert it to safetensors, nothing is unpickled here",
        "pytorch_model-00001-of-00002.bin": "convert it to safetensors, nothing is unpickled here",
        "consolidated.00.pth": "a copy of the model in safetensors",
        "model-Q4_K_M.gguf": "a copy of the model in safetensors",
        "adapter_model.safetensors": "merge it into the one that it was made for",
        "consolidated.safetensors": "a copy of the model in safetensors",
        "model-00001-of-00001.safetensors": "model.safetensors.index.json, which names such parts, is missing",
        "model.fp16.safetensors": "call it model.safetensors",
        "gptq_model-4bit-128g.safetensors": "call it model.safetensors",
    },
    "tokenizer.json": {
        name: "transformers can convert it" for name in ("tokenizer.model", "vocab.json", "tekken.json")
    },
}
ALL_IN_PLACE = [(missing, other) for missing, others in IN_PLACE_OF.items() for other in others]


@pytest.mark.parametrize(("missing", "other"), ALL_IN_PLACE, ids=str)
def test_what_lies_in_the_place_of_a_file(tiny: Path, missing: str, other: str):
    (tiny / other).parent.mkdir(parents=True, exist_ok=True)
    (tiny / missing).rename(tiny / other)
    message = refusal(load, tiny, device="cpu")
    assert message.startswith(f"{tiny / missing} is missing: there is only {other}: ")
    assert IN_PLACE_OF[missing][other] in message


@pytest.mark.parametrize(
    ("missing", "other"), [(missing, other) for missing, others in IN_PLACE_OF.items() for other in others]
)
def test_what_a_repository_has_in_the_place_of_a_file(monkeypatch: pytest.MonkeyPatch, missing: str, other: str):
    """Of that nothing would be fetched, and so nothing known."""
    Hub(monkeypatch, AssertionError("nothing must be downloaded"))
    files = [*({"config.json", "model.safetensors", "tokenizer.json"} - {missing}), other, "README.md"]
    monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda name: files)
    message = refusal(fetch, "someone/model")
    assert f"{missing} is missing: there is only {other}: " in message
    assert IN_PLACE_OF[missing][other] in message


def test_a_repository_that_has_all_that_is_needed_is_fetched(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, tiny)
    for files, with_tokenizer in (
        (["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin"], True),
        (["config.json", "model.safetensors.index.json", "tokenizer.json"], True),
        (["config.json", "model.safetensors", "tokenizer.model"], False),
    ):
        monkeypatch.setattr("minihogwild.hub.loading.listed_on_hub", lambda name, files=files: files)
        assert fetch("someone/model", with_tokenizer) == tiny


def test_several_that_lie_there(tiny: Path):
    for steps in (500, 1000, 1500):
        (tiny / f"checkpoint-{steps}").mkdir()
        shutil.copy(tiny / "config.json", tiny / f"checkpoint-{steps}")
    (tiny / "config.json").unlink()
    assert "there is only checkpoint-1000/config.json and 2 more: " in refusal(load, tiny, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json", "added_tokens.json", "chat_template.jinja",
                                  "adapter_config.json", "model.safetensors.index.json"])  # fmt: skip
def test_a_link_that_leads_nowhere_is_not_nothing(tiny: Path, name: str):
    """As in a snapshot of the hub's cache that was copied without the files that it links to."""
    (tiny / name).unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (tiny / "model.safetensors").unlink()
    (tiny / name).symlink_to("../../blobs/0123")
    message = refusal(load, tiny, device="cpu")
    assert f"{tiny / name}" in message
    assert "it is a link that leads nowhere" in message


def test_words_that_a_link_does_not_lead_to(tiny: Path):
    (tiny / "prompts.json").symlink_to("../../blobs/0123")
    assert "prompts.json cannot be read: it is a link that leads nowhere" in refusal(prompts_of, tiny)


# ---- the context


def test_a_context_for_whoever_knows_better(tmp_path: Path):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY))
    assert load(folder, device="cpu").config.context == 512
    assert load(folder, device="cpu", context=100).config.context == 100
    assert load(folder, device="cpu", context=9000).config.context == 9000
    mistral = TINY | {"model_type": "mistral", "sliding_window": 512}
    folder = make_folder(tmp_path / "mistral", mistral, make_tensors(mistral))
    load(folder, device="cpu")
    assert "sliding-window attention is not supported: 512 tokens, of a context of 513" in refusal(
        load, folder, device="cpu", context=513
    )


def test_the_option_reaches_the_run(tmp_path: Path):
    folder = make_folder(tmp_path, TINY, make_tensors(TINY))
    arguments = ("a" * 60, "--model", folder, "--workers", 1, "--max-steps", 2, "--device", "cpu", "--dtype", "float32")
    assert said(generate.main, *arguments)[0] == 0
    code, _, err = said(generate.main, *arguments, "--context", 50)
    assert code == 2
    assert "too long for a context of 50" in err
    for wrong in ("0", "-5", "many"):
        code, _, err = said(generate.main, *arguments, "--context", wrong)
        assert code == 2
        assert "--context" in err


# ---- the hub, where it has nothing for us


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (GatedRepoError(), "it is gated, its owners ask for consent"),
        (RepositoryNotFoundError(), "no such repository, or a private one: then log in"),
        (LocalEntryNotFoundError("no"), "the hub cannot be reached"),
        (OfflineModeIsEnabled("no"), "the hub is not asked (HF_HUB_OFFLINE)"),
        (EntryNotFoundError("no"), "the repository has no config.json"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("options", [["hi"], ["--plan"]], ids=["run", "plan"])
def test_why_the_hub_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, options
):
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, error)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: hub.download("x"))
    code, out, err = said(generate.main, "--model", "someone/model", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"minihogwild: someone/model: neither a folder nor to be had from the hub: {reason}")
    assert err.count("\n") == 1


def test_a_hub_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def ask(hub, name, timeout):
        asked.append((name, timeout))
        raise HubSaysNothingTimeout

    class HubSaysNothingTimeout(Exception):
        pass

    def download(name, **options) -> str:
        asked.append(options["local_files_only"])
        return "here"

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", ask)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("someone/tiny-model") == Path("here")
    assert asked == [("someone/tiny-model", 5), True]


@pytest.mark.parametrize("asked", ["fetch", "fetch_config"])
def test_a_server_that_never_answers(tmp_path: Path, asked):
    """As it is, with the library's own waiting and asking again: it was ten minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        program = "from minihogwild.hub import loading; loading.HUB_SECONDS = 1; loading.ASKED('some/model')"
        command = [sys.executable, "-c", program.replace("ASKED", asked)]
        done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=60)
    assert "the hub cannot be reached, and nothing of it is kept here" in done.stderr


class Dribbling(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        with suppress(OSError):  # nobody listens any more
            for _ in range(300):
                self.wfile.write(b" ")
                time.sleep(0.1)

    do_HEAD = do_GET

    def log_message(self, *what):
        """Nothing."""


@pytest.mark.parametrize(
    ("asked", "said"),
    [("fetch", "the hub cannot be reached, and nothing of it is kept here"), ("fetch_config", "it takes more than")],
)
def test_a_server_that_answers_a_byte_at_a_time(tmp_path: Path, asked, said):
    with ThreadingHTTPServer(("127.0.0.1", 0), Dribbling) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        program = "from minihogwild.hub import loading; loading.HUB_SECONDS = 0.3; loading.ASKED('some/model')"
        began = time.monotonic()
        command = [sys.executable, "-c", program.replace("ASKED", asked)]
        done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert time.monotonic() - began < 20
    assert said in done.stderr


class Overloaded(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.status)
        self.send_header("Retry-After", "100")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *what):
        """Nothing."""


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("options", [[], ["--plan"]])
def test_a_server_that_has_too_much_to_do_is_told_in_one_line(tmp_path: Path, status, options):
    with ThreadingHTTPServer(("127.0.0.1", 0), Overloaded) as server:
        server.status = status
        threading.Thread(target=server.serve_forever).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "minihogwild.generate", "--model", "some/model", *options]
        done = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert done.returncode == 2
    assert "the hub cannot be reached, and nothing of it is kept here" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
