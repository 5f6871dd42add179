"""Runs in object stores: copied once, fetched again where they change, refused in a sentence."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

import thermo_opt as to
from thermo_opt.cli import main
from thermo_opt.runs import remote

DATA = Path(__file__).parents[2] / "data" / "digits-adam"


@pytest.fixture(name="cache")
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THERMO_OPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="store")
def _store(cache):
    store = fsspec.filesystem("memory")
    store.put(str(DATA), "/bucket/digits-adam", recursive=True)
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def counted(store, monkeypatch):
    """The files that were fetched since."""
    fetched = []
    get = type(store).get

    def counting(self, names, parts, **options):
        fetched.extend(names)
        return get(self, names, parts, **options)

    monkeypatch.setattr(type(store), "get", counting)
    return fetched


def test_a_run_in_a_store_gives_the_same_numbers_and_is_fetched_once(store, monkeypatch):
    fetched = counted(store, monkeypatch)
    expected = to.audit(DATA, lens="outputs").summary
    for url in ("memory://bucket/digits-adam", "memory://bucket/digits-adam/"):
        assert to.audit(url, lens="outputs").summary == expected
    assert len(fetched) == len(store.find("/bucket/digits-adam"))
    probe = "memory://bucket/digits-adam/probe.safetensors"
    assert to.audit(url, probe=probe, lens="outputs").summary["distance"] > 0


def test_files_that_changed_are_fetched_again_and_those_that_are_gone_go(store, monkeypatch):
    first = to.load_run("memory://bucket/digits-adam")
    fetched = counted(store, monkeypatch)
    names = sorted(n for n in store.find("/bucket/digits-adam") if "/snapshots/" in n)
    store.rm_file(names[-1])
    store.pipe("/bucket/digits-adam/steps.jsonl", b'{"step": 1, "loss": 2.5}\n')
    second = to.load_run("memory://bucket/digits-adam")
    assert fetched == ["/bucket/digits-adam/steps.jsonl"]
    assert second.steps["loss"].tolist() == [2.5]
    assert [s.step for s in second.snapshots] == [s.step for s in first.snapshots][:-1]


def test_the_command_line_takes_urls(store, capsys):
    assert main(["info", "memory://bucket/digits-adam"]) == 0
    assert main(["pareto", "memory://bucket/digits-adam", str(DATA), "--target-loss", "1"]) == 0
    assert "digits-adam" in capsys.readouterr().out


def test_what_is_not_there_is_said(store, cache, capsys, monkeypatch):
    assert main(["audit", "memory://bucket/nothing"]) == 2
    assert "memory://bucket/nothing: nothing is there" in capsys.readouterr().err
    assert not remote.is_remote("C:/runs")
    assert not remote.is_remote(str(DATA))
    assert not remote.is_remote("unheard-of://bucket/run")
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("a file is in the way")
    assert main(["audit", "memory://bucket/digits-adam"]) == 2
    assert "THERMO_OPT_CACHE" in capsys.readouterr().err


def test_a_copy_that_was_cut_short_goes_on(store, monkeypatch):
    monkeypatch.setattr(remote, "_TOGETHER", 3)
    get, calls = type(store).get, []

    def failing(self, names, parts, **options):
        calls.append(len(names))
        if len(calls) == 3:
            raise ConnectionError("the line is dead")
        return get(self, names, parts, **options)

    monkeypatch.setattr(type(store), "get", failing)
    with pytest.raises(to.InputError, match="the line is dead"):
        to.load_run("memory://bucket/digits-adam")
    to.load_run("memory://bucket/digits-adam")
    assert sum(calls) == len(store.find("/bucket/digits-adam")) + calls[2]


def test_names_that_lead_outside_are_refused(store, cache, monkeypatch):
    listed = {"/bucket/digits-adam/../../evil": {"name": "x", "size": 1, "type": "file"}}
    monkeypatch.setattr(type(store), "find", lambda *_, **__: listed)
    with pytest.raises(to.InputError, match="points outside"):
        to.load_run("memory://bucket/digits-adam")


def test_a_local_object_store(tmp_path, cache, monkeypatch):
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    there = server.ThreadedMotoServer(port=0)
    there.start()
    host, port = there.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        store = fsspec.filesystem("s3")
        store.mkdir("runs")
        store.put(str(DATA), "runs/digits-adam", recursive=True)
        got = to.audit("s3://runs/digits-adam", lens="outputs").summary
        assert got == to.audit(DATA, lens="outputs").summary
        z = np.cumsum(np.random.default_rng(0).normal(size=(3, 5, 4)), 0)
        np.savez(tmp_path / "all.npz", logits=z, labels=[0, 1, 2, 3, 0])
        store.put(str(tmp_path / "all.npz"), "runs/predictions/all.npz")
        assert to.audit("s3://runs/predictions").summary["distance"] > 0
    finally:
        there.stop()
