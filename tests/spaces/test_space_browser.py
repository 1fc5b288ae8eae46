"""The Space in headless Chromium: every tab is used, and every picture is checked.

`DMP_SCREENSHOTS=docs/images` also writes the screenshots there.
"""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from space_process import running_space

pytest.importorskip("selenium", reason="pip install selenium")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 60  # seconds to wait for a picture
DESKTOP, PHONE = (1280, 1000), (390, 844)
TABS = {"generate": "Generate", "compare": "Compare", "specialise": "Specialisation", "guide": "Guide"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="apt-get install chromium chromium-driver"),
]


class Page:
    """The page in a browser: what a user can do and see."""

    def __init__(self, browser: webdriver.Chrome, url: str):
        self.browser = browser
        self.url = url

    def open(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.get(self.url)
        self.wait_for(lambda: self.pictures("generate"))

    def wait_for(self, condition: Callable):
        deadline = time.monotonic() + PATIENCE
        while True:
            found = condition()
            if found:
                return found
            assert time.monotonic() < deadline, f"{condition} did not come true:\n{self.text()}"
            time.sleep(0.1)

    def find(self, selector: str) -> list[WebElement]:
        """The visible elements that a CSS selector matches."""
        return [element for element in self.browser.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]

    def text(self) -> str:
        return self.browser.find_element(By.TAG_NAME, "body").text

    def click(self, element: WebElement) -> None:
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def select_tab(self, title: str) -> None:
        tabs = [tab for tab in self.find("button[role=tab]") if tab.text == title]
        if not tabs:  # tabs that do not fit on the page are in a menu
            self.click(self.find(".overflow-menu > button")[0])
            tabs = [tab for tab in self.find(".overflow-dropdown button") if tab.text == title]
        self.click(tabs[0])

    def press(self, label: str) -> None:
        self.click(next(button for button in self.find("button") if button.text.strip() == label))

    def pictures(self, tab: str) -> list[str]:
        """The addresses of the tab's pictures that are loaded."""
        script = "return arguments[0].complete && arguments[0].naturalWidth > 0"
        images = self.find(f"[id^={tab}-] img")
        return [image.get_attribute("src") for image in images if self.browser.execute_script(script, image)]

    def screenshot(self, path: Path) -> None:
        self.browser.execute_script("window.scrollTo(0, 0)")
        time.sleep(0.5)  # until animations end
        picture = Image.open(io.BytesIO(self.browser.get_screenshot_as_png()))
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)

    @property
    def width(self) -> int:
        return self.browser.execute_script("return document.documentElement.scrollWidth")


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Iterator[str]:
    with running_space(tmp_path_factory.mktemp("space") / "log.txt") as url:
        yield url


@pytest.fixture
def page(space) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--force-color-profile=srgb",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Page(browser, space)
    finally:
        browser.quit()


@pytest.fixture
def screenshots(tmp_path) -> Path:
    return Path(os.environ.get("DMP_SCREENSHOTS", tmp_path))


def assert_not_blank(address: str) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(httpx.get(address).content)).convert("L"))
    assert pixels.std() > 5, f"{address} is blank."


def severe_messages(page: Page) -> list[str]:
    """The console's errors, except for missing fonts."""
    entries = page.browser.get_log("browser")
    return [entry["message"] for entry in entries if entry["level"] == "SEVERE" and "font" not in entry["message"]]


def test_every_tab_generates(page, screenshots):
    page.open(DESKTOP)
    answers = {
        "generate": ("Generated by DTR with seed", 1),
        "compare": ("Generated from the same noise", 5),
        "specialise": ("At timestep 500 each block works on", 1),
        "guide": ("Both have seed", 2),
    }
    for tab, (sentence, num_pictures) in answers.items():
        page.select_tab(TABS[tab])
        page.wait_for(lambda tab=tab, count=num_pictures: len(page.pictures(tab)) >= count)
        at_once = page.pictures(tab)
        assert sentence not in page.text()
        page.click(page.find(f"#{tab}-button")[0])
        page.wait_for(lambda sentence=sentence: sentence in page.text())
        page.wait_for(
            lambda tab=tab, before=at_once: len(page.pictures(tab)) >= len(before) and page.pictures(tab) != before
        )
        for address in {*at_once, *page.pictures(tab)}:
            assert_not_blank(address)
        page.screenshot(screenshots / f"space_{'specialisation' if tab == 'specialise' else tab}.png")
    assert not severe_messages(page)


def test_examples_are_shown_at_once(page):
    page.open(DESKTOP)
    before = page.pictures("generate")
    begun = time.monotonic()
    page.press("Dresses by Remix-DiT")
    page.wait_for(lambda: page.pictures("generate") and page.pictures("generate") != before)
    assert time.monotonic() - begun < 3
    assert page.find("input[aria-label=System]")[0].get_attribute("value") == "Remix-DiT"
    assert "Example: Dresses by Remix-DiT." in page.text()
    page.select_tab(TABS["compare"])
    before = page.wait_for(lambda: page.pictures("compare"))
    page.press("All five, ankle boots")
    page.wait_for(lambda: len(page.pictures("compare")) == 5 and not set(page.pictures("compare")) & set(before))


def test_the_scale_follows_the_system(page):
    page.open(DESKTOP)
    system = page.find("input[aria-label=System]")[0]
    page.click(system)
    system.send_keys(Keys.CONTROL, "a")
    system.send_keys("PPAP", Keys.ENTER)
    page.wait_for(lambda: "7.5" in [number.get_attribute("value") for number in page.find("input[type=number]")])
    page.click(page.find("#generate-button")[0])
    page.wait_for(lambda: "Generated by PPAP with seed" in page.text())


def test_the_page_shows_errors(page):
    page.open(DESKTOP)
    seed = page.find("input[type=number][aria-label=Seed], label input[type=number]")[-1]
    page.click(seed)
    seed.send_keys(Keys.CONTROL, "a")
    seed.send_keys("-5")
    page.click(page.find("#generate-button")[0])
    page.wait_for(lambda: "Expected the seed to be a whole number between 0 and" in page.text())
    assert page.find("#generate-button")[0].is_enabled()


def test_phone_width(page, screenshots):
    page.open(PHONE)
    for tab, title in TABS.items():
        page.select_tab(title)
        page.wait_for(lambda tab=tab: page.pictures(tab))
        assert page.width <= PHONE[0], f"{tab} is {page.width} pixels wide."
    page.select_tab(TABS["generate"])
    page.screenshot(screenshots / "space_phone.png")
    assert not severe_messages(page)
