"""Build hook: a wheel holds `sparsegrad` alone, so it must not announce the harness's console script."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Drop the console script from standard wheels; editable installs keep it."""

    def initialize(self, version, build_data):  # noqa: D102
        if version == "standard":
            self.metadata.core.scripts.clear()
