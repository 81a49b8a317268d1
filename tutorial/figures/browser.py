"""Draws browser.png: the page of examples/browser, where one worker waits for another's result. Needs chromium."""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[2]
WORKERS, SIZE = 4, {"width": 1180, "height": 860}


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def draw(address: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        expect(page.locator("#go")).to_be_enabled()
        page.locator(f"#workers input[value='{WORKERS}']").check()
        finished, waiting = page.locator("#finished li"), page.locator(".pane.waits .t")
        while finished.count() < 6 or waiting.count() == 0:
            page.locator("#step").click()
        waiting.last.hover()
        expect(page.locator("#looking li").first).to_be_visible()
        picture = Image.open(BytesIO(page.screenshot()))
        browser.close()
    picture.convert("RGB").quantize(96).save(Path(__file__).with_name("browser.png"), optimize=True)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=ROOT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    draw(f"http://127.0.0.1:{server.server_port}/examples/browser/")
