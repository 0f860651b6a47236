"""pandas is imported for the Slurm plugin when it is used, and not before."""

from __future__ import annotations

import subprocess
import sys

LISTED = "import sys; print(*sorted({'pandas.core', 'numpy.linalg'} & set(sys.modules)))"


def loaded_after(code: str) -> list[str]:
    """Return which of the two submodules are loaded after `code` has run in a process of its own."""
    words = [sys.executable, "-c", f"{code}\n{LISTED}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def test_still_needed_as_the_plugin_imports_pandas_at_its_start():
    assert loaded_after("import snakemake_executor_plugin_slurm") == ["numpy.linalg", "pandas.core"]


def test_pandas_is_not_loaded_until_it_is_used():
    stand_ins = (
        "from longhaul.compat.slurm_plugin_imports import import_pandas_when_used\n"
        "import_pandas_when_used()\nimport snakemake_executor_plugin_slurm as plugin\n"
        "from importlib.util import find_spec\nassert find_spec('pandas') and find_spec('numpy')\n"
    )
    assert loaded_after(stand_ins) == []
    use = "from snakemake_executor_plugin_slurm.efficiency_report import pd\nassert pd.isna(None)\n"
    assert loaded_after(stand_ins + use) == ["numpy.linalg", "pandas.core"]
