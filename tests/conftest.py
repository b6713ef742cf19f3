"""What every test shares: one thread, one seed, no policy from the environment, and a browser where there is one."""

import os
import shutil

# Before torch is imported: two workers on two cores, and the same sums in every run.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: how long an example takes says nothing on a shared machine. Reproducible by default; `make
# test-full` draws new examples each time.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("full", settings.get_profile("default"), derandomize=False, max_examples=500)
settings.load_profile("default")


def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """Seed torch, and let no GRADKEEL_* variable of the developer's shell into a test."""
    torch.manual_seed(0)
    for name in [name for name in os.environ if name.startswith("GRADKEEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRADKEEL_LANG", "en")  # whatever the locale
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):  # other libraries leave them behind
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that selenium drives; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # containers give /dev/shm 64 MB
        "--disable-background-networking",
        "--no-sandbox",  # Chromium refuses its sandbox to root, and the pages are our own
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def found(monkeypatch):
    """Look for the native kernels again, in this test and after it."""
    from gradkeel.kernels import native

    native._found.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._found.cache_clear()
