"""The wheel and the sdist build, and the wheel works with nothing but its four dependencies."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
CORE = ("torch", "einops", "jaxtyping", "beartype")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_core_dependencies():
    core = [need for need in requires("attncongruence") if "extra ==" not in need]
    assert sorted(need.split(">=")[0] for need in core) == sorted(CORE)


def test_contents(built):
    wheel, sdist = built
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert sources | {"attncongruence/py.typed"} == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "tests/data/released_code.npz", "Makefile"} <= inside


USE_IT = """
import sys
from importlib.metadata import distributions
import torch
import attncongruence as ac

assert ac.__file__.startswith(sys.prefix), ac.__file__
print(*sorted(d.metadata["Name"].lower() for d in distributions()))
scores = torch.zeros(1, 3, 3)
scores[0, :2, 0] = torch.tensor(3.0).log()
print(round(float(ac.cacr_loss(scores, 2, convention=ac.WEIGHTED_MEAN, direction="language")), 4))
encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
with ac.capture_attention(encoder) as capture:
    encoder(torch.randn(2, 5, 8))
    ac.cacr_loss(capture.pop(), 2).backward()
print(encoder.layers[0].self_attn.in_proj_weight.grad.abs().sum().item() > 0)
"""


def link_distributions(site, names):
    """Link these installed distributions, and what they need in turn, into another environment's site-packages."""
    seen, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        own = distribution(wanted.name)
        for file in own.files:
            target = site / file
            if ".." not in file.parts and file.locate().exists() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.locate())
        for need in map(Requirement, own.requires or []):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (wanted.extras or {""})):
                waiting.append(need)
    return {canonicalize_name(Requirement(need).name) for need in seen}


def test_the_wheel_alone(built, tmp_path):
    """A virtual environment of its own: the wheel, its four dependencies and what those need, nothing else.

    The dependencies are linked from this environment, distribution by distribution, instead of fetched again: torch
    alone is gigabytes. The list starts from the wheel's own metadata and follows each distribution's.
    """
    wheel, _ = built
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:  # all that an installer does with pure Python: this needs no pip
        archive.extractall(site)
    linked = link_distributions(site, CORE)
    unwanted = {"transformers", "timm", "lightning", "matplotlib", "pillow", "torchvision", "tqdm", "numpy"}
    assert not linked & unwanted
    result = subprocess.run([str(python), "-I", "-c", USE_IT], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    present, value, gradient = result.stdout.splitlines()
    assert {canonicalize_name(name) for name in present.split()} == linked | {"attncongruence"}
    assert (value, gradient) == ("0.2747", "True")
