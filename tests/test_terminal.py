"""What a person sees while a command works."""

from seresvit.terminal import training_bar


def test_a_training_shows_rate_time_left_and_losses_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    note = "adversarial 0.321 · l1 0.0312 · discriminator 0.234 · ms_ssim 0.123 · best val MAE 12.3"
    with training_bar() as progress:
        for images in range(0, 120_001, 20_000):
            progress(2, images, 120_000, note)
    shown = capsys.readouterr().err
    assert "120000/120000" in shown and "images/s" in shown and "0:00:00" in shown
    assert " ".join(shown.split()).endswith(note) and shown.endswith("\n")
    assert max(map(len, shown.splitlines())) <= 80


def test_only_the_process_that_speaks_shows_it(capsys):
    with training_bar(visible=False) as progress:
        progress(1, 5, 10, "l1 0.1")
    assert capsys.readouterr() == ("", "")
