// Package debian brings tests what a Debian mirror has and a repository should
// not: root file systems, and the erofs-utils of unstable, which write what
// those of Debian 12 cannot.
//
//	root := debian.Root(t)          // a directory; nobody writes to it
//	python := debian.Python(t)      // another, for chroot(2)
//	mkfs := debian.Mkfs(t)
//	mkfs.Run(t, "-zzstd", "-Efragments", "root.erofs", root)
//	dir := mkfs.Mount(t, "root.erofs") // by erofsfuse
//
// All come from the mirror that this machine's apt uses, once; they are kept
// in the user's cache directory, and whoever asks at the same time, in another
// process, waits. Where EROFS_OCI_REQUIRE does not name the capability "debian",
// the test that asks is skipped: it takes root, a network and a minute.
//
// The root is what debootstrap --foreign --variant=minbase leaves: all packages
// unpacked, none configured, so that nothing in it is run. The one with Python is
// installed to the end, which its packages' scripts do: caches of the dynamic
// linker and compiled modules are what a program finds in any container. The
// utilities are run by their own ld.so with their own libraries.
package debian
