"""Draws trace.png: the page that `--trace` writes, as Bob's result comes, for which Alice waits. Needs chromium."""

import shutil
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

from minihogwild.generate import DUET, main
from minihogwild.prompts import prompts_of

STEP, LAYER, HEAD, SIZE = 198, "6", "3", {"width": 1180, "height": 960}


def draw(path: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(path.as_uri())
        page.locator(".pane").first.wait_for()
        page.locator("#scrub").fill(str(STEP))
        page.locator("#layer").select_option(label=LAYER)
        page.locator("#head").select_option(label=HEAD)
        picture = Image.open(BytesIO(page.screenshot()))
        browser.close()
    picture.convert("RGB").quantize(96).save(Path(__file__).with_name("trace.png"), optimize=True)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.html"
        main([prompts_of(DUET).problem, "--device", "cpu", "--plain", "--pace", "0", "--trace", str(path)])
        draw(path)
