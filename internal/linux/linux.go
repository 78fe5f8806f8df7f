// Package linux wraps the few things that Tine asks of the kernel and that the
// standard library has no words for: processes that cannot be mistaken for
// others, what their memory costs, which of their pages are copies, and files
// with holes.
//
// Every call is tried again when a signal interrupts it, and every error says
// which object it is about. The package decides nothing.
package linux
