"""The commands, as they are typed: what they print, and the one line and exit code 2 of a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TEXT

import experiments
from configs import base
from textgen.config import flatten
from textgen.generation.transforms import TRANSFORMS

ROOT = Path(__file__).parents[1]
CACHE = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"), "JAX_PLATFORMS": "cpu"}
TINY = [
    "--config=configs/tiny.py",
    "--config.train.steps=20",
    "--config.eval.every_steps=10",
    "--config.sample.length=20",
]


def command(name, *flags):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]


def alone(name, *flags):
    """A command in a process of its own."""
    return subprocess.run(
        command(name, *flags), cwd=ROOT, env=os.environ | CACHE, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def call():
    """The same, of processes that share their imports: see tests/launcher.py."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.launcher"], cwd=ROOT, env=os.environ | CACHE, **pipes
    ) as server:

        def call(name, *flags):
            print(json.dumps([name, *map(str, flags)]), file=server.stdin, flush=True)
            return subprocess.CompletedProcess(flags, *json.loads(server.stdout.readline()))

        yield call


def refused(done, message):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def stopped(words, metrics, how):
    """What a command prints that is sent a signal as soon as its curve begins."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | CACHE, **pipes)
    deadline = time.time() + 120
    while not metrics.exists() or not metrics.read_text():
        assert time.time() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "everything so far is saved. To go on, run the same command again:" in out
    assert "Traceback" not in out + err
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.mark.slow
def test_train_interrupt_resume_sample_evaluate(folder, call):
    workdir = folder / "runs" / "one"
    train = [*TINY, f"--config.corpus.path={folder / 'text.txt'}", f"--workdir={workdir}", "--config.train.steps=4000"]
    train += ["--config.eval.every_steps=4000", "--config.checkpoint.every_steps=4000"]
    out = stopped(command("train", *train), workdir / "metrics.jsonl", signal.SIGINT)
    step = int(out.split("Stopped after step ")[1].split(";")[0])

    done = call("train", *train[:-3], f"--config.train.steps={step + 20}", *train[-2:])
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step}" in done.stdout
    assert "validation loss in windows" in done.stdout
    assert "--- temperature 0.2" in done.stdout
    assert "tensorboard --logdir" in done.stdout

    sampled = alone(
        "sample", f"--workdir={workdir}", "--prompt=The ", "--length=9", "--num_samples=2", "--json", "--top_k=3"
    )
    records = [json.loads(line) for line in sampled.stdout.splitlines()]
    assert [len(r["tokens"]) for r in records] == [9, 9]
    assert records[0]["recipe"]["sampler"] == "top_k(3)"
    (folder / "samples.jsonl").write_text(sampled.stdout)
    replayed = call("sample", f"--replay={folder / 'samples.jsonl'}")
    assert records[1]["text"] in replayed.stdout
    assert "2 made again, the same token by token." in replayed.stdout
    (folder / "samples.jsonl").write_text(sampled.stdout.replace('"seed": 0', '"seed": 1'))
    assert "not the same: line 1, 2" in call("sample", f"--replay={folder / 'samples.jsonl'}").stderr
    streamed = call("sample", f"--workdir={workdir}", "--prompt=The ", "--length=9", "--stream", "--top_k=3")
    assert streamed.stdout == "The " + records[0]["text"] + "\n"
    evaluated = json.loads(call("evaluate", f"--workdir={workdir}", "--json").stdout)
    assert set(evaluated) == {"windows", "stream"}
    explored = call("explore", f"--workdir={workdir}", "--temperatures=0.5,1", "--length=30", "--num_samples=2")
    assert explored.returncode == 0, explored.stderr
    assert "comes nearest to unseen text" in explored.stdout or "as surprising to it" in explored.stdout
    assert (workdir / "explore.html").read_text().startswith("<!DOCTYPE html>")
    assert len(json.loads((workdir / "explore.json").read_text())["settings"]) == 2


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train", ["--config.model.widht=4"], "Unknown config key 'widht'. Did you mean 'width'?"),
        ("train", ["--config.model.width=wide"], "model.width"),
        ("train", ["--workdri=x"], "Unknown command line flag 'workdri'"),
        ("train", ["stray"], "Unexpected argument 'stray'"),
        ("train", ["--config.corpus.path=/absent"], "there is no file or folder '/absent'"),
        ("train", ["--config=configs/tny.py"], "Did you mean 'configs/tiny.py'"),
        ("train", ["-config=configs/tny.py"], "Did you mean 'configs/tiny.py'"),
        ("train", ["--config=configs/base.py:x"], "error: configs/base.py takes no argument, got ':x'."),
        ("train", ["--config.eval.window=9999"], "eval.window=9999 takes 10000 tokens, and the validation text has"),
        ("train", ["--config.log.profile_step=20"], "log.profile_step=20 must be below train.steps=20"),
        ("train", ["--config.model.backbone=lstm", "--config.model.context=9"], "model.backbone=transformer or hybrid"),
        ("train", ["--config.model.backbone=lsmt"], "Did you mean 'lstm'"),
        (
            "train",
            ["--config.optimizer.clip_norm=None", "--config.model.width=None"],
            "model.width must be of type int",
        ),
        ("train", ["--config.mesh.data=8"], "takes 8 x 1 x 1 = 8 devices"),
        ("sample", ["--workdir=/absent"], "There is no workdir '/absent'"),
        ("sample", [], "Give the run's folder: --workdir=DIR"),
        ("sample", ["--replay=/absent", "--seed=1"], "leave out --seed"),
        ("sample", ["--workdir=/absent", "--gamma=2"], "--speculate proposes"),
        ("sample", ["--replay=/absent"], "There is no file '/absent'"),
        ("explore", ["--workdir=/absent"], "There is no workdir '/absent'"),
        ("evaluate", ["--workdir=/absent"], "There is no workdir '/absent'"),
        ("compare", ["--sweep=model.widht=4,8"], "unknown config key 'model.widht'. Did you mean 'model.width'?"),
        ("compare", [], "The config has no section 'compare'"),
        ("compare", ["--config.compare.seeds=2"], "write its keys in the sweep"),
        ("compare", ["--sweep=model.width=4,8 compare.sedes=2"], "Did you mean 'compare.seeds'?"),
        ("compare", ["--sweep=model.width=4,8 compare.seeds=two"], "compare.seeds is 3 by default, and takes no 'two'"),
        ("train", ["--config.width=64"], "Unknown config key 'width'. Did you mean model.width?"),
        ("train", ["--config.optimizer.momentum=0.5"], "is read with optimizer.name=muon or sgd, and it is adamw"),
        ("train", ["--config.tokenizer.vocab_size=500"], "is read with tokenizer.kind=words or bpe"),
        ("train", ["--config.log.profile_steps=5"], "is read where log.profile_step is set, and it is None"),
        ("train", ["--config.corpus.path="], "corpus.path is empty"),
        ("evaluate", ["--workdir=x", "--text=y", "--split=train"], "leave out --split"),
        (
            "probes",
            ["--config=configs/probes.py:parity,copy", "--config.train.steps=5"],
            "probes.tasks.copy.train.steps",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, call, name, flags, message):
    first = (
        [*TINY, f"--config.corpus.path={folder / 'text.txt'}", f"--workdir={folder / 'no'}"]
        if name in ("train", "compare")
        else []
    )
    done = call(name, *first, *flags)
    refused(done, message)
    assert not (folder / "no").exists()


def test_ctrl_c_where_nobody_can_catch_it_is_not_lost():
    """As in a callback of the collector, which Python leaves at the end of an exception, and goes on."""
    code = (
        "import gc\nfrom experiments import launch\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        "def main():\n    gc.callbacks.append(interrupt); gc.collect(); print('went on')\n"
        "launch(main, goes_on=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert "stopped; what was saved stays" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_is_told_the_same_by_a_process_of_its_own():
    refused(alone("train", *TINY, "--config.model.widht=4"), "Unknown config key 'widht'. Did you mean 'width'?")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(arg=''): pass", "get_config of '{file}' returns None"),
        ("config = {}", "'{file}' has no function get_config(arg)"),
        (
            "def get_config(arg=''):\n    return None.width",
            "'{file}', line 2: AttributeError: 'NoneType' object has no",
        ),
        ("def get_config(arg=''):\n    return {}['width']", "'{file}', line 2: KeyError: 'width'"),
        ("class Bad(ValueError): pass\nraise Bad('no')", "'{file}', line 2: Bad: no"),
        ("widht", "'{file}', line 1: NameError: name 'widht' is not defined"),
        ("raise ValueError('a width\\nthat: is no\\nnumber')", "error: a width that: is no number"),
        (
            "from configs import base\ndef get_config(arg=''):\n    base.get_config().lock().model.nonsense = 3",
            "Unknown config key 'nonsense'.",
        ),
        (None, "There is no config file '{file}'"),
    ],
)
def test_a_config_file_that_gives_no_config_is_said(tmp_path, call, code, message):
    file = tmp_path / "mine.py"
    if code:
        file.write_text(code)
    for given in ([f"--config={file}"], ["--config", file]):
        refused(call("train", *given), message.format(file=file))


def test_too_little_memory_is_said(folder, call):
    flags = [*TINY, f"--config.corpus.path={folder / 'text.txt'}", f"--workdir={folder / 'large'}"]
    refused(
        call("train", *flags, "--config.data.batch_size=10000000000000"), "There is not enough memory: lower data.batch"
    )


@pytest.mark.slow
def test_compare_is_stopped_and_goes_on(folder, call):
    workdir = folder / "runs" / "duel"
    flags = [*TINY, f"--config.corpus.path={folder / 'text.txt'}", f"--workdir={workdir}"]
    flags += ["--sweep=model.backbone=lstm,transformer", "--config.train.steps=200", "--config.sample.length=10"]
    flags += ["--config.eval.every_steps=200", "--config.model.width=16", "--config.model.layers=1"]
    stopped(command("compare", *flags), workdir / "lstm/0/metrics.jsonl", signal.SIGTERM)
    done = call("compare", *flags)
    assert done.returncode == 0, done.stderr
    assert "transformer, seed 2: validation loss" in done.stdout
    assert (workdir / "report.html").is_file()
    assert len(json.loads((workdir / "results.json").read_text())["arms"]) == 2


def test_help_has_every_key_of_the_base_config():
    keys = experiments.config_keys(experiments.BASE.read_text())
    assert {key for key, _, _ in keys} == set(flatten(base.get_config().to_dict()))
    assert all(comment for _, _, comment in keys)


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "explore", "compare", "probes", "benchmark"])
def test_help_shows_the_flags_and_exits_with_0(name, call):
    done = call(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m experiments.{name}" in done.stdout
    flag = {"benchmark": "only"}.get(name, "workdir")
    assert f"  --{flag}: " in done.stdout
    assert ("optimizer.warmup_steps = 100  # " in done.stdout) == (name in ("train", "compare", "probes"))
    if name == "sample":
        assert all(f"  {transform}(" in done.stdout for transform in TRANSFORMS)
