"""The report as a page for a browser."""

import html.parser

from search.by_hand import report_page


class Seen(html.parser.HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def seen(markdown, title="drop28"):
    parser = Seen()
    parser.feed(report_page.page(markdown, title))
    return parser


def test_tables_and_pictures_are_shown():
    page = seen("# A report\n\n| asked | answered |\n|---|---|\n| 1 + 1 | 2 |\n\n![losses](shards.png)\n")
    assert {"h1", "table", "td", "img"} <= set(page.tags)
    assert ("src", "shards.png") in page.attributes
    assert "1 + 1" in page.texts
    assert "br" in seen("| a |\n|---|\n| one<br>two |\n").tags


def test_nothing_that_a_model_wrote_becomes_a_part_of_the_page():
    answer = '<script>alert(1)</script> <img src=x onerror="alert(2)"> [a](javascript:alert(3)) </title>'
    page = seen(f"| answered |\n|---|\n| {answer} |\n\n{answer}\n", title=answer)
    assert not {"script", "img", "a"} & set(page.tags)
    assert page.tags.count("title") == 1
    assert any("<script>alert(1)</script>" in text for text in page.texts)
    assert not any(name.startswith("on") for name, _ in page.attributes)
