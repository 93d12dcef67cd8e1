"""What errors quote of a log."""

from evaluator import last_words


def test_lines_that_name_an_error_go_before_what_follows_them(tmp_path):
    log = tmp_path / "log"
    log.write_text("start\nTraceback\nValueError: no such model\n\nbye\nnanobind: leaked 3 instances!\n")
    assert last_words.of(log) == " (its last words: ValueError: no such model)"
    log.write_text("ImportError: an optional part\n" + "step\n" * 40 + "one\ntwo\nthree\nfour\n")
    assert last_words.of(log) == " (its last words: two | three | four)"


def test_a_long_log_is_cut_and_an_empty_one_is_not_quoted(tmp_path):
    log = tmp_path / "log"
    assert last_words.of(log) == ""
    log.write_text("nanobind: leaked 3 instances!\n\n")
    assert last_words.of(log) == ""
    log.write_bytes(b"\xff" * 9000 + b"error " + b"x" * 9000)
    assert len(last_words.of(log)) < 400
