"""TensorBoard opens on a run: the page that the command names is there, with the layout."""

import json
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

from megavlm.cli import main as cli
from megavlm.monitor.board import Board


def heeds_ctrl_c():
    """In the child: whoever starts the tests in the background of a script has told them, and all that they start, to ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_page_has_the_layout(tmp_path):
    board = Board(tmp_path / "run" / "tensorboard", 1, True)
    board.scalars({"loss/generation": 1.0}, 1)
    board.close()
    command = [sys.executable, "-m", "megavlm", "board", tmp_path / "run", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c) as server:
        try:
            assert server.stdout is not None
            address, _, page = server.stdout.readline().strip().partition("#")
            assert page == "custom_scalars"
            with urlopen(f"{address}data/plugin/custom_scalars/layout", timeout=60) as answer:
                layout = json.load(answer)
            assert layout["category"][0]["title"] == "1 quality"
        finally:
            server.send_signal(signal.SIGINT)
        assert "ended by Ctrl-C; the run is as it was" in server.communicate()[1] and server.returncode == 130


def test_a_folder_without_events_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megavlm", "board", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "holds nothing that TensorBoard shows" in capsys.readouterr().err
