// Package guest runs a program under a Linux kernel of one's choice: Debian's
// kernel for clouds, booted by qemu in software, with an initial file system
// that holds the program and nothing else.
//
//	k, err := guest.Fetch(ctx, cache, "bookworm-backports")
//	exit, err := k.Run(ctx, guest.Job{Files: files, Argv: []string{"/bin/job"}}, os.Stdout)
//
// The kernel packages come from the mirror that this machine's apt is configured
// for, through an apt whose sources, lists and downloads are in a directory of
// their own: nothing is installed, and apt's own state is not touched. What is
// needed of a package (the kernel, a few modules and what these depend on) stays
// in the cache directory; from then on no network is needed. To get a newer
// kernel delete that directory.
//
// The guest has three serial ports, so that what the kernel says never gets into
// the middle of what the program says:
//
//	ttyS0   console       kernel messages; part of the error when a boot fails
//	ttyS1   output        stdout and stderr of the program, byte for byte
//	ttyS2   exit status   one line, written last
//
// What there is to be mounted is a disk of the guest. DebianImages makes images of
// a real Debian, whole and in part, in each compression, and a listing of what is
// in them; they are kept in the cache directory, too.
//
// There is no network but loopback, no udev, no shell. Its PID 1 is the program
// in ./init; it loads the modules, runs the job, and powers the machine off.
package guest
