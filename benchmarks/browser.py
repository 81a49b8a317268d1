"""The page of examples/browser in headless Chromium, on one CPU core: how fast it opens and steps, and its memory.

python benchmarks/browser.py
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
FASTEST = "6"  # the slider's last place
PRODUCTS = 6 * (4 * 256 * 256 + 3 * 256 * 640) + 342 * 256  # multiplications by weights of duet, a token

# As the page does it, without drawing: what the engine alone takes
ENGINE_ALONE = """async workers => {
  const { parse_config, read_safetensors, arrange_weights } = await import("./engine.js");
  const { Run } = await import("./loop.js");
  const { Tokenizer } = await import("./words.js");
  const folder = document.documentElement.dataset.model;
  const json = async name => (await fetch(folder + name)).json();
  const config = parse_config(await json("config.json"));
  const file = await (await fetch(folder + "model.safetensors")).arrayBuffer();
  const model = { config, weights: arrange_weights(read_safetensors(file), config) };
  const words = await json("prompts.json");
  const run = new Run(model, new Tokenizer(await json("tokenizer.json")), words, words.problem, workers);
  while (run.is_reading_prompt) run.next();
  const began = performance.now();
  while (run.next().length > 0);
  return [run.forward_steps, run.forward_steps / (performance.now() - began) * 1000];
}"""


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def serve() -> str:
    """The page's address, from a server that runs as long as this program."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=ROOT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/examples/browser/"


def measure_page(page: Page, address: str) -> dict:
    """One visit: open, start at once, as fast as it can, to the team's end."""
    began = time.perf_counter()
    page.goto(address)
    expect(page.locator("#go")).to_be_enabled()
    opened = time.perf_counter()
    page.locator("#speed").fill(FASTEST)
    page.locator("#go").click()
    expect(page.locator("#panes .t").first).to_be_visible(timeout=60_000)
    first_step = time.perf_counter()
    process = page_process()
    used = cpu_seconds(process)
    expect(page.locator("#said")).to_contain_text("done after", timeout=600_000)
    done = time.perf_counter()
    used = cpu_seconds(process) - used
    steps = int(page.locator("#team_count").text_content().split()[-2])
    return {
        "seconds to open": opened - began,
        "seconds to the first step": first_step - began,
        "steps a second, two workers and the one beside, drawn": steps / (done - first_step),
        "the same, a second of CPU time of the page's process": steps / used,
        "MB of the page's process": process.memory_full_info().pss / 1e6,
    }


def page_process() -> psutil.Process:
    """This program's largest Chromium process that shows a page; memory that several share is divided among them."""
    children = psutil.Process().children(recursive=True)
    renderers = [child for child in children if "--type=renderer" in child.cmdline()]
    return max(renderers, key=lambda renderer: renderer.memory_full_info().pss)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--visits", type=int, default=3)
    options = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # of all that follows, the browser too
    figures = {"multiplications a token, at least": PRODUCTS}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        address = serve()
        visits = []
        for _ in range(options.visits):
            page = browser.new_context().new_page()
            visits.append(measure_page(page, address))
            page.context.close()
        for name in visits[0]:
            figures[name] = round(statistics.median(visit[name] for visit in visits), 2)
        page = browser.new_page()
        page.goto(address)
        process = page_process()
        for workers in (1, 2, 4, 6):
            used = cpu_seconds(process)
            steps, steps_a_second = page.evaluate(ENGINE_ALONE, workers)
            used = cpu_seconds(process) - used  # also for loading, and for the prompt
            figures[f"steps a second, engine alone, workers: {workers}"] = round(steps_a_second, 1)
            figures[f"the same, a second of CPU time, workers: {workers}"] = round(steps / used, 1)
        browser.close()
    for name, value in figures.items():
        print(f"{name:60} {value:12,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
