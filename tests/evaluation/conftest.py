"""What the tests of the report share: its page opened in a Chromium."""

import pytest


@pytest.fixture
def opened(chromium):
    """A function that opens a file at a width; the test fails when a page says or loads anything."""
    views, said = [], []

    def open_page(path, width):
        view = chromium.new_page(viewport={"width": width, "height": 800})
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        view.goto(path.as_uri())
        views.append(view)
        return view

    yield open_page
    for view in views:
        view.close()
    assert said == []
