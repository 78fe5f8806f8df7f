package cli

import (
	"cmp"

	"github.com/spf13/cobra"
)

// engineFlags are how a daemon in this process runs machines. All verbs have them,
// as most can have such a daemon.
func (a *app) engineFlags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVar(&a.flags.engine, "engine", "auto", "engine of a daemon in this process: auto, firecracker, qemu-kvm or qemu-tcg")
	f.StringVar(&a.flags.firecracker, "firecracker", "", "`PATH` of Firecracker, or its name in $PATH (default $TINE_FIRECRACKER or firecracker)")
	f.StringVar(&a.flags.cpuTemplate, "cpu-template", "", "with Firecracker: have guests see only what `NAME|FILE` leaves of the processor, so that their snapshots are for other hosts too")
	a.completeFlag(root, "engine", words(
		cobra.CompletionWithDesc("auto", "the best that is usable"),
		cobra.CompletionWithDesc("firecracker", "Firecracker, on KVM"),
		cobra.CompletionWithDesc("qemu-kvm", "QEMU, on KVM"),
		cobra.CompletionWithDesc("qemu-tcg", "QEMU's emulator, on any host"),
	))
	a.completeFlag(root, "firecracker", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault // files
	})
	a.completeFlag(root, "cpu-template", func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return []cobra.Completion{"T2", "T2A", "T2CL", "T2S", "C3"}, cobra.ShellCompDirectiveDefault // or files
	})
}

// words completes one of list.
func words(list ...cobra.Completion) completer {
	return func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return list, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) firecracker() string {
	return cmp.Or(a.flags.firecracker, a.Getenv("TINE_FIRECRACKER"))
}
