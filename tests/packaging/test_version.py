"""The version that the command line prints."""

from importlib import metadata


def test_the_version_is_that_of_the_installed_package(run_cli):
    assert run_cli("--version") == (0, f"continual {metadata.version('continual')}\n", "")


def test_without_an_installed_package_the_version_says_so(run_cli, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    code, out, err = run_cli("--version")
    assert (code, err) == (0, "")
    assert "not installed" in out
