"""Asks the page hostile questions in a headless Chromium and prints what came of it as one JSON object. Run by test_page_hostile.py:
python browser_hostile.py URL TEXT (the hostile text)."""

from __future__ import annotations

import json
import sys
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright


def main(url: str, hostile: str) -> None:
    outside: list[str] = []
    dialogs: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium",
                                       args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page()
        host = urlsplit(url).netloc
        page.on("request", lambda r: outside.append(r.url) if r.url.startswith("http") and urlsplit(r.url).netloc != host else None)
        # What the page's content security policy stops is named, too, but never leaves.
        page.on("requestfailed", lambda r: outside.remove(r.url) if r.url in outside and r.failure == "csp" else None)
        page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
        page.goto(url)
        page.wait_for_selector(".chip.ready", timeout=120_000)
        for question in (f"Does vitamin D help? {hostile}", "I want to kill myself"):
            page.fill("#box textarea", question)
            page.keyboard.press("Enter")
            page.wait_for_timeout(500)
            page.wait_for_selector("#stop", state="hidden", timeout=120_000)
            page.wait_for_timeout(800)
        page.get_by_role("button", name="About this model").click()
        page.wait_for_timeout(800)
        seen = {
            "executed": page.evaluate("document.documentElement.hasAttribute('data-executed')"),
            "question": page.locator("#left [data-testid='user']").first.inner_text(),
            "answer": page.locator("#left [data-testid='bot']").last.inner_text(),
            "about": page.locator(".about").last.inner_text(),
            "handlers": page.evaluate("[...document.querySelectorAll('#left *, .about *')].flatMap(e => [...e.attributes])"
                                      ".filter(a => /^on/i.test(a.name)).map(a => a.name + '=' + a.value)"),
            "links": page.evaluate("[...document.querySelectorAll('a, iframe, form, base, object, embed')]"
                                   ".map(e => e.href || e.src || e.action || '').filter(h => /^(javascript|data):/i.test(h))"),
        }
        browser.close()
    print(json.dumps({**seen, "outside": outside, "dialogs": dialogs}))


main(sys.argv[1], sys.argv[2])
