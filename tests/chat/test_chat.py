"""Chat: a conversation through pipes, on a terminal, and what is kept of it."""

import io
import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from PIL import Image

import cobra_edge
from cobra_edge.chat import command as chat
from cobra_edge.chat import conversation as conversation_module
from cobra_edge.chat import lines, transcript
from cobra_edge.chat.conversation import Conversation
from cobra_edge.chat.interrupts import Interrupts, Pressed
from cobra_edge.chat.lines import completions
from cobra_edge.chat.transcript import write_transcript
from cobra_edge.decode.sampling import GREEDY
from cobra_edge.errors import InputError
from cobra_edge.terminal.output import run_command

from ..conftest import MINI
from ..terminal_case import SLOW, OnTerminal

IMAGE = MINI / "demo.png"
WHAT, HOW_MANY, RED = "What is in the image?", "How many objects are there?", "Is there a red circle?"
CHAT = "from cobra_edge.chat.command import main; main()"


@pytest.fixture(scope="module")
def bundle(mini_bundle):
    return str(mini_bundle("w4a16-g128"))


@pytest.fixture(scope="module")
def session(bundle):
    return cobra_edge.load(bundle)


@pytest.fixture
def talk(session, monkeypatch, capfd):
    """Return what a chat through a pipe says to lines: its exit code, stdout and stderr."""
    monkeypatch.setattr(chat.Opening, "load", lambda self: session)

    def through(*said: str | bytes, arguments=("--image", str(IMAGE))):
        sent = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in said)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent), encoding="utf-8"))
        code = run_command(chat.command, ["BUNDLE", *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return through


def answers(session, *questions, limit=256):
    """Return the texts of a conversation about the image, held in Python."""
    texts, start = [], session.look(IMAGE)
    for question in questions:
        start = session.ask(start, question, max_new_tokens=limit)
        texts.append(start.read())
    return texts


def test_a_conversation_through_a_pipe(bundle, session):
    command = [sys.executable, "-m", "cobra_edge", "chat", bundle, "--image", str(IMAGE)]
    done = subprocess.run(command, input=f"{WHAT}\n{HOW_MANY}\n{RED}", capture_output=True, text=True, timeout=60)
    expected = answers(session, WHAT, HOW_MANY, RED)
    assert (done.returncode, done.stdout) == (0, "\n".join(expected) + "\n")
    assert done.stderr.startswith(f"{IMAGE}, encoded in ") and ">" not in done.stderr
    assert len(set(expected)) == 3


def test_cached_states(talk, session):
    said = [HOW_MANY, RED, "/reset", RED, f"/image {IMAGE}", HOW_MANY, "/quit", "never asked"]
    code, out, err = talk(*said, arguments=["--json", "--image", str(IMAGE)])
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["remembered"] for r in records] == ["image", "conversation", "image", "image"]
    count, red = answers(session, HOW_MANY, RED)
    assert [r["text"] for r in records] == [count, red, answers(session, RED)[0], count]
    assert [r["question"] for r in records] == [HOW_MANY, RED, RED, HOW_MANY]
    assert all(r["image"] == str(IMAGE) and r["visual_tokens"] == 64 and r["finish"] == "end" for r in records)
    assert f"a new conversation about {IMAGE}, cached" in err and err.count("a new conversation") == 2


def test_asking_about_nothing_seen(talk):
    code, out, _ = talk("Hello?", arguments=["--json", "--max-new-tokens", "1"])
    (record,) = map(json.loads, out.splitlines())
    assert code == 0 and (record["image"], record["remembered"], record["visual_tokens"]) == (None, "nothing", 0)
    assert (record["finish"], record["new_tokens"]) == ("length", 1)


def test_a_cut_answer_is_marked(talk):
    code, out, err = talk(HOW_MANY, arguments=["--image", str(IMAGE), "--max-new-tokens", "1"])
    assert code == 0 and out.strip() and err.endswith("cut at the token limit\n")
    _, _, err = talk(HOW_MANY, arguments=["--image", str(IMAGE)])
    assert "cut" not in err


@pytest.mark.parametrize("line", ["/quit", "/quit ", "/quit now"])
def test_quitting(talk, line):
    assert talk(line, "never asked")[:2] == (0, "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "the line is empty; type a question"),
        ("  \t", "the line is empty"),
        ("<image>", "the prompt is empty"),
        ("red " * 2000, "already read; shorten it, or /reset"),
        ("x" * (2 << 20), "a line of more than 1,048,576 characters; shorten it"),
        ("/image", "/image needs a file, for example /image scene.png"),
        ("/save  ", "/save needs a file, for example /save scene.json"),
        ("/image nowhere.png", "nowhere.png: cannot be read (No such file or directory)"),
        (f"/image {__file__}", "test_chat.py: not an image; expected one of PNG"),
        ("/imag x.png", "unknown command '/imag'; did you mean '/image'?"),
    ],
)
def test_a_line_that_is_refused_and_the_conversation_goes_on(talk, session, line, reason):
    code, out, err = talk(HOW_MANY, line, RED)
    assert (code, out) == (2, "\n".join(answers(session, HOW_MANY, RED)) + "\n")
    assert err.splitlines()[1].startswith("error: ") and reason in err
    code, out, err = talk(HOW_MANY, line, RED, arguments=["--json", "--image", str(IMAGE)])
    records = [json.loads(text) for text in out.splitlines()]
    assert code == 2 and [r.get("text") for r in records] == [
        *answers(session, HOW_MANY),
        None,
        answers(session, HOW_MANY, RED)[1],
    ]
    assert reason in records[1]["error"] and "error" not in err


def test_a_bad_image_to_begin_with_is_bad_input(talk, tmp_path):
    code, out, err = talk(HOW_MANY, arguments=["--image", str(tmp_path / "none.png")])
    assert (code, out) == (2, "") and "none.png: cannot be read" in err


def test_a_model_without_eyes(tiny_bundle, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"/image {IMAGE}\nHello?\n".encode())))
    assert run_command(chat.command, [str(tiny_bundle), "--max-new-tokens", "2", "--json"]) == 2
    refused, answered = map(json.loads, capfd.readouterr().out.splitlines())
    assert "is a text-only model" in refused["error"] and answered["remembered"] == "nothing"


def test_bytes_that_are_no_text_and_other_line_ends(talk, session):
    code, out, _ = talk(b"caf\xe9 \xff\n", f"{HOW_MANY}\r".encode() + b"\n", arguments=["--json", "--image", str(IMAGE)])
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["question"] for r in records] == ["caf\ufffd \ufffd", HOW_MANY]


def test_a_question_that_begins_with_a_slash(talk):
    code, out, _ = talk(" /image of what?", arguments=["--json", "--image", str(IMAGE)])
    assert code == 0 and json.loads(out)["question"] == " /image of what?"


def test_control_characters_do_not_reach_the_terminal(talk, session, monkeypatch):
    monkeypatch.setattr(type(session.codec), "decode", lambda self, tokens: "\x1b[2Jwiped\n")
    real = cobra_edge.Session.generate

    def hostile(self, *arguments, **named):
        answer = real(self, *arguments, **named)
        answer._pieces = (piece for piece in ["\x1b[2J", "wiped\n", "\x07"])
        return answer

    monkeypatch.setattr(cobra_edge.Session, "generate", hostile)
    _, out, err = talk(HOW_MANY)
    assert out == "\ufffd[2Jwiped\n\ufffd\n" and "\x1b" not in err


def test_at_most_eight_images_are_remembered(session, tmp_path, monkeypatch):
    looked = []
    real = session.look
    monkeypatch.setattr(session, "look", lambda image: looked.append(image) or real(image))
    files = [tmp_path / f"{index}.png" for index in range(9)]
    for index, file in enumerate(files):
        Image.new("RGB", (32, 32), (index * 20, 0, 0)).save(file)
    talked = Conversation(session, GREEDY, 8)
    assert [talked.show(file) for file in files[:8]] == [False] * 8
    assert talked.show(files[0]) and len(looked) == 8  # the one that was shown longest ago is now files[1]
    assert not talked.show(files[8]) and not talked.show(files[1]) and talked.show(files[0])
    files[2].write_bytes(files[0].read_bytes())
    assert talked.show(files[2])  # another name for what was seen
    assert len(talked._states) == conversation_module.CACHED_IMAGES and len(looked) == 10


def test_an_image_that_cannot_be_shown_leaves_all_as_it_was(session, tmp_path):
    talked = Conversation(session, GREEDY, 256)
    talked.show(IMAGE)
    first = talked.ask(HOW_MANY)
    first.read()
    talked.keep(HOW_MANY, first)
    (tmp_path / "half.png").write_bytes(IMAGE.read_bytes()[:300])
    with pytest.raises(InputError, match="half.png: .*truncated"):
        talked.show(tmp_path / "half.png")
    assert talked.image.path == IMAGE and len(talked.turns) == 1 and talked.reuse == "conversation"
    assert talked.ask(RED).read() == answers(session, HOW_MANY, RED)[1]


def test_the_transcript(talk, session, tmp_path):
    file = tmp_path / "said here.json"
    code, _, err = talk(HOW_MANY, RED, f"/save '{file}'", f"/save {file}", "/reset", "/save x.json")
    assert code == 2 and f"saved: {file}" in err
    assert "already exists" in err and "nothing to save" in err
    saved = json.loads(file.read_text())
    count, red = answers(session, HOW_MANY, RED)
    assert saved["messages"] == [
        {"role": "user", "content": HOW_MANY},
        {"role": "assistant", "content": count},
        {"role": "user", "content": RED},
        {"role": "assistant", "content": red},
    ]
    assert [(a["text"], a["remembered"]) for a in saved["answers"]] == [(count, "image"), (red, "conversation")]
    assert all(a["ttft_ms"] > 0 for a in saved["answers"])
    digest = subprocess.run(["sha256sum", IMAGE], capture_output=True, text=True, check=True).stdout.split()[0]
    assert saved["image"] == {"path": str(IMAGE), "sha256": digest}
    build = saved["bundle"]
    assert (build["model"], build["scheme"], len(build["fingerprint"])) == ("cobra-mini", "w4a16-g128", 64)
    assert saved["runtime"]["decoder"] == session.decoder.name and saved["sampling"]["temperature"] == 0
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_a_transcript_that_cannot_be_written(session, tmp_path, monkeypatch):
    talked = Conversation(session, GREEDY, 4)
    answer = talked.ask("Hello?")
    answer.read()
    talked.keep("Hello?", answer)
    with pytest.raises(InputError, match=r"none/x.json: cannot be written \(No such file or directory\)"):
        write_transcript(talked, tmp_path / "none" / "x.json")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="already exists"):
        write_transcript(talked, tmp_path / "dangling")

    def full(source, goal):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transcript, "rename_new", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_transcript(talked, tmp_path / "x.json")
    assert [f.name for f in tmp_path.iterdir()] == ["dangling"]


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my scenes").mkdir()
    for name in ("one.png", "only.png", ".hidden.png", "my scenes/red.png"):
        (tmp_path / name).touch()
    assert completions("/", 0) == ["/image ", "/reset", "/save ", "/help", "/quit"]
    assert completions("/i", 0) == ["/image "] and completions("What", 0) == []
    assert completions("/image o", 7) == ["one.png", "only.png"]
    assert completions("/image ", 7) == ["my scenes/", "one.png", "only.png"]
    assert completions("/image .h", 7) == [".hidden.png"]
    assert completions("/image my sc", 10) == ["scenes/"]
    assert completions("/image my scenes/r", 10) == ["scenes/red.png"]
    assert completions("/save ~/on", 6) == ["~/one.png", "~/only.png"]
    assert completions("/image none/x", 7) == completions("/help o", 6) == completions("what o", 5) == []


def test_the_signal_stops_an_answer_and_raises_elsewhere():
    before, interrupts = signal.getsignal(signal.SIGINT), Interrupts()
    with interrupts.handle_sigint():
        with interrupts.answering():
            assert not interrupts.stop
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert interrupts.stop
        with pytest.raises(Pressed):
            signal.raise_signal(signal.SIGINT)
        with interrupts.answering():
            assert not interrupts.stop
    assert signal.getsignal(signal.SIGINT) == before


def test_on_a_terminal(bundle, session, tmp_path):
    """Ctrl-C in an answer and in a line, a follow-up, completion and the history, as a person types them."""
    with OnTerminal(SLOW + CHAT, bundle, "--image", IMAGE, XDG_STATE_HOME=str(tmp_path)) as chatting:
        chatting.until("/help for help")
        chatting.until("> ")
        chatting.type(f"{WHAT}\r")
        chatting.until(WHAT)
        begun = chatting.until("A large")
        chatting.interrupt()
        said = (begun + chatting.until("\r\nstopped, ")).replace("^C", "").strip().removesuffix("stopped,").strip()
        figures = chatting.until("> ")
        assert "tokens/s, first token after" in figures and "cached: image" in figures
        stopped = session.ask(IMAGE, WHAT)
        for _ in stopped:
            if stopped.text.strip() == said:
                stopped.stop()
        assert stopped.finish == "stopped" and len(stopped.tokens) < 20
        chatting.type(f"{HOW_MANY}\r")
        assert f"\r\n{session.ask(stopped, HOW_MANY).read()}\r\n" in chatting.until("cached: conversation")
        chatting.until("> ")
        chatting.type("half a line")
        chatting.until("half a line")
        chatting.interrupt()
        chatting.until("press Ctrl-C again to exit")
        chatting.until("> ")
        chatting.type(f"/im\t{IMAGE.parent}/dem\t\r")  # completed, and what was half written is gone
        chatting.until("demo.png, cached")
        chatting.until("> ")
        chatting.type("/nothing\r")
        chatting.until("error: unknown command '/nothing'")
        chatting.until("> ")
        chatting.type("\x04")
        assert chatting.ended() == 0
    history = tmp_path / "cobra_edge" / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert history.read_text().splitlines() == [WHAT, HOW_MANY, f"/image {IMAGE}", "/nothing"]

    history.chmod(0o644)
    with OnTerminal(CHAT, bundle, "--image", IMAGE, "--json", XDG_STATE_HOME=str(tmp_path)) as again:
        again.until("> ")
        again.type("\x1b[A\x1b[A\x1b[A\r")  # three up
        record = again.until('"remembered": "image"}')
        assert json.loads(record[record.index("{") :])["question"] == HOW_MANY
        again.until("> ")
        again.interrupt()
        again.until("press Ctrl-C again to exit")
        again.until("> ")
        again.interrupt()
        again.until("interrupted")
        assert again.ended() == 130
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_prompts_go_to_stderr_where_stdout_is_no_terminal(bundle, session):
    own, its = os.openpty()
    command = [sys.executable, "-m", "cobra_edge.chat", bundle, "--image", str(IMAGE)]
    child = subprocess.Popen(command, stdin=its, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(own, f"{HOW_MANY}\n\x04".encode())
    out, err = child.communicate(timeout=60)
    os.close(own)
    os.close(its)
    assert (child.returncode, out) == (0, answers(session, HOW_MANY)[0] + "\n") and err.count("> ") == 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_conversation_through_a_pipe(bundle, name):
    command = [sys.executable, "-c", SLOW + CHAT, bundle, "--image", str(IMAGE)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdin.write(f"{WHAT}\n{WHAT}\n")
    child.stdin.flush()
    assert child.stdout.read(1) == "A"
    child.send_signal(getattr(signal, name))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err.strip().splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert out.count("large") <= 1  # the second question was not answered any more


def test_a_closed_stdin_is_bad_input(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where it was closed before the start
    assert run_command(chat.command, ["BUNDLE"]) == 2
    assert capfd.readouterr().err == "error: stdin is closed; use a terminal, a file or a pipe\n"


def test_without_readline_there_are_lines_all_the_same(monkeypatch, talk, session):
    monkeypatch.setattr(lines, "readline", None)
    code, out, _ = talk(HOW_MANY)
    assert (code, out) == (0, answers(session, HOW_MANY)[0] + "\n")
