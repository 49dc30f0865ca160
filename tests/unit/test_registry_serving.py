"""A bundle with item graphs and generations, served by a process of its own: what that process imports."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from qbrec.registry.bundle import write_bundle
from qbrec.registry.model import requirements, serving_script
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact
from tests.support.grown_run import evaluation
from tests.support.grown_shop import configuration

# Notes every import statement that our code and the served script execute, loaded already or not.
SERVE = """
import builtins, json, runpy, sys
importing, imported = builtins.__import__, set()
def noting(name, globals=None, locals=None, fromlist=(), level=0):
    importer = globals or {}
    ours = str(importer.get("__name__")).partition(".")[0] == "qbrec" or importer.get("__file__") == script
    if ours and not level:
        imported.add(name.partition(".")[0])
    return importing(name, globals, locals, fromlist, level)
script, bundle, histories = json.load(sys.stdin)
builtins.__import__ = noting
served = runpy.run_path(script)
context = served["PythonModelContext"](artifacts={"bundle": bundle}, model_config={})
model = served["QbrecModel"]()
model.load_context(context)
import qbrec.ranking.kernels
qbrec.ranking.kernels.NATIVE_ITEMS = 0  # as in a large catalogue
out = model.predict(context, served["pd"].DataFrame({"history": histories}), {"k": 7})
print(json.dumps([sorted(imported - sys.stdlib_module_names - {"qbrec"}), out.to_dict("list")]))
"""


def test_the_requirements_are_what_serving_imports(
    shop_root: Path, joined_run: dict[str, Artifact], tmp_path: Path
) -> None:
    config, histories = configuration(shop_root), [["n7", "i5"], ["i8", "m3", "i30"]]
    artifacts = {**joined_run, "evaluation": evaluation(shop_root)}
    bundle = write_bundle(tmp_path / "bundle", config=config, artifacts=artifacts, card="")
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=json.dumps([str(serving_script()), str(bundle), histories]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported, served = json.loads(done.stdout.splitlines()[-1])
    expected = Recommender.from_artifacts(joined_run, ranking=config.ranking).recommend(histories, k=7)
    assert served["item_id"] == [[item["item_id"] for item in items] for items in expected]
    # Another kernel, and maybe another number of threads: sums in another order.
    scores = [[item["score"] for item in items] for items in expected]
    np.testing.assert_allclose(served["score"], scores, rtol=1e-5)
    listed, brings = {line.partition("==")[0] for line in requirements()}, metadata.packages_distributions()
    found = {name: {one.lower() for one in brings[name]} & listed for name in imported}
    assert [name for name, distributions in found.items() if not distributions] == []
    assert set().union(*found.values()) == listed
