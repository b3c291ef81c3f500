# SPDX-License-Identifier: Apache-2.0
"""Every class of `batiste.errors`: its message holds its arguments and a link, it can be pickled, its page is true."""

from __future__ import annotations

import doctest
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from batiste import errors
from batiste.graph.errors import ShapeError

NAMES = sorted(errors.__all__)
PAGES = Path(__file__).parents[1] / "docs" / "errors"
DOCUMENTED = [name for name in NAMES if issubclass(getattr(errors, name), errors.DocumentedError)]


def sample(name: str) -> tuple[errors.FlaxError, list[str]]:
    """An error of this class, and the words it was made from."""
    cls = getattr(errors, name)
    words = [f"<{p}>" for p in inspect.signature(cls).parameters]
    if name == "CursorFindError":
        return cls(*(SimpleNamespace(_path=word) for word in words)), words
    if name == "ApplyScopeInvalidVariablesStructureError":
        return cls({"params": {"<variables>": 0}}), words
    if name == "TraverseTreeError":
        return cls(*words), ["update_fn", "cond_fn"]
    return cls(*words), words


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_message_holds_the_arguments_and_ends_with_the_link(name):
    error, words = sample(name)
    for word in words:
        assert word in str(error)
    assert str(error).endswith(f"#flax.errors.{name})")
    assert isinstance(error, errors.FlaxError)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_pickling_keeps_class_and_message(name):
    error, _ = sample(name)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_there_are_39_names_and_the_base_catches_the_errors_of_the_core_too():
    assert len(NAMES) == 39
    for cls in (errors.TraceContextError, errors.ImmutableVariableError, ShapeError):
        assert issubclass(cls, errors.FlaxError)


def test_the_messages_that_depend_on_their_arguments():
    assert "No object found" in str(errors.CursorFindError())
    assert "are None" in str(errors.TraverseTreeError(None, None))
    assert 'at step: "1" and path: "p": multiprocess arrays need' in str(errors.MPARestoreTargetRequiredError("p", 1))
    assert "below which are 'a'" in str(errors.ApplyScopeInvalidVariablesStructureError({"params": {"a": 1}}))
    assert str(errors.FlaxError("something happened")) == "something happened."


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """In a folder of its own, and without JAX's note on frames that it left out."""
    monkeypatch.chdir(tmp_path)
    mode = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "tracebackhide")
    yield
    jax.config.update("jax_traceback_filtering", mode)


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_class_says_what_it_means_raises_it_and_shows_the_fix(name):
    cls, page = getattr(errors, name), (PAGES / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n\n{inspect.getdoc(cls).splitlines()[0]}\n\n")
    assert re.search(rf"^{cls.__module__}.{cls.__qualname__}: ", page, re.M)
    examples = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", page, re.M | re.S))
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(doctest.DocTestParser().get_doctest(examples, {"__name__": __name__}, name, None, None), out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)


def test_there_is_no_page_of_a_class_that_is_gone():
    assert {page.stem for page in PAGES.glob("*.md")} == {*NAMES, "README"}
