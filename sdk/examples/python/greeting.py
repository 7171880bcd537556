"""Leaves a greeting in each VM, as the configuration says."""

import json

from wit_world import exports


class HookPreflight(exports.HookPreflight):
    def run(self, context, vm, facts, report):
        if "\n" in json.loads(context.config())["greeting"]:
            report.failure("greeting", "the greeting has more than one line", "write it in one")


class HookContributeGuest(exports.HookContributeGuest):
    def run(self, context, vm, facts, guest):
        config = json.loads(context.config())
        text = config["greeting"].replace("{vm}", vm.name()) + "\n"
        guest.file(config["path"], text.encode(), 0o644, 0, 0)
        print("greets", vm.name())
