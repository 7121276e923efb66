"""`npp demo`: the page and its images, asked for as a browser would, and what it refuses."""

import io
import re
import socket
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import npp_ds
from npp_ds.cli import app
from npp_ds.errors import UserError
from npp_ds.sampling.folder import tiled
from sample_sets import tiny_run

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return npp_ds.load(tiny_run(tmp_path_factory.mktemp("demo") / "run"))


@pytest.fixture
def browser(model):
    from starlette.testclient import TestClient

    from npp_ds.sampling.demo import create_app

    return TestClient(create_app(model), base_url="http://127.0.0.1:7860")


def test_the_images_are_those_of_the_model_with_the_class_scale_seed_and_count_asked_for(model, browser):
    answer = browser.get("/images.png", params={"class": 2, "cfg": 2.5, "seed": 9, "count": 10})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    expected = np.stack([np.asarray(image) for image in model.sample(2, 10, cfg_scale=2.5, seed=9)])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(tiled(expected, 8)))


def test_the_page_offers_every_class_and_loads_nothing_from_elsewhere(browser):
    page = browser.get("/").text
    assert re.findall(r'<option value="(\d)">', page) == ["0", "1", "2"]
    assert "tiny, step 120" in page and not re.search(r"(src|href)=.?https?:", page)


@pytest.mark.parametrize(
    "query, message",
    [
        ({"class": 3}, "classes: found 3"),
        ({"class": "x"}, "invalid literal"),
        ({"cfg": -1}, "cfg_scale: found -1"),
        ({"cfg": "nan"}, "cfg_scale: found nan"),
        ({"count": 65}, "count: found 65, expected 1 to 64"),
    ],
)
def test_a_bad_request_is_one_line(browser, query, message):
    answer = browser.get("/images.png", params=query)
    assert answer.status_code == 400 and message in answer.text and "\n" not in answer.text


def test_other_hosts_and_other_sites_are_refused(browser):
    for path in ("/", "/images.png"):
        assert browser.get(path, headers={"host": "evil.example:7860"}).status_code == 400
        assert browser.get(path, headers={"host": "localhost:7860"}).status_code == 200
    assert browser.get("/images.png", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_it_listens_on_this_machine_alone_and_a_taken_port_is_one_line(model, monkeypatch, capsys):
    from npp_ds.sampling.demo import serve

    servers = []
    real = uvicorn.Server
    monkeypatch.setattr(
        "npp_ds.sampling.demo.uvicorn.Server", lambda config: servers.append(real(config)) or servers[0]
    )
    bound = []
    run = real.run
    monkeypatch.setattr(real, "run", lambda self, sockets: bound.extend(sockets) or run(self, sockets))
    thread = threading.Thread(target=serve, args=(model, "run", 0), daemon=True)
    thread.start()
    while not (servers and servers[0].started):
        assert thread.is_alive()
        thread.join(0.05)
    host, port = bound[0].getsockname()
    assert host == "127.0.0.1"
    assert b"<h1>tiny</h1>" in urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).read()
    with pytest.raises(UserError, match=f"port {port}: .*; give another one with --port"):
        serve(model, "run", port)
    servers[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive() and f"run: http://127.0.0.1:{port} " in capsys.readouterr().out
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    monkeypatch.delitem(__import__("sys").modules, "npp_ds.sampling.demo", raising=False)
    done = CliRunner().invoke(app, ["demo", str(tmp_path)])
    assert str(done.exception) == "npp demo needs uvicorn: pip install 'npp_ds[demo]' (starlette and uvicorn)"
