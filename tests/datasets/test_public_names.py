import importlib

import pytest


@pytest.mark.parametrize("package", ["openrlhf.datasets", "openrlhf.utils"])
def test_public_names_are_loaded_on_first_use(package):
    module = importlib.import_module(package)
    assert all(callable(getattr(module, name)) for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018
