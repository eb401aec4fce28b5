import pytest
from accelerate.state import AcceleratorState, PartialState


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process; each test begins without."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
