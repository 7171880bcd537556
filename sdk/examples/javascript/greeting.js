// Leaves a greeting in each VM, as the configuration says.

export const hookPreflight = {
  run(context, vm, facts, report) {
    if (JSON.parse(context.config()).greeting.includes("\n")) {
      report.failure("greeting", "the greeting has more than one line", "write it in one");
    }
  },
};

export const hookContributeGuest = {
  run(context, vm, facts, guest) {
    const { greeting, path } = JSON.parse(context.config());
    const text = `${greeting.replaceAll("{vm}", vm.name())}\n`;
    guest.file(path, new TextEncoder().encode(text), 0o644, 0, 0);
    console.log("greets", vm.name());
  },
};
