// Package format holds tests that compare, on a whole Debian root file system,
// what a mount of ours shows with what the kernel's erofs shows of the same
// image: every field of stat(2), every xattr, link and byte, and the order of
// every directory.
//
// The root is that of package debian, with a directory of oddities added:
//
//	debootstrap's root ── copied, oddities added ──→ a tree
//	a tree ── mkfs.erofs, Debian 12's or unstable's ──→ an image an algorithm
//	an image ── kernel erofs ──→ what is right
//	         ── fusefs, in a process of its own ──→ what is compared
package format
