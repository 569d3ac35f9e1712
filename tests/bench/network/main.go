// Command network measures what a user waits for and what a registry is asked for
// when an image is read over a network: each backend in turn mounts an image of
// Debian (26 MB of lz4, 1,400 entries) from a registry in this process, which is
// 20 ms away on a link of 25 MB/s. It prints tables in Markdown.
//
//	network [-binary bin/erofs-oci] [-image FILE | -large] [-backends nbd,file,fuse,nbdkit]
//	        [-latency 20ms] [-bandwidth 25000000] [-file 3145728] [-rounds 3]
//	network -guest bookworm-backports …
//
// With -guest it does the same in a guest with the kernel of that suite, which has
// nbd; see package guest. The processor of a guest is emulated: there the GETs
// count, and the ratio of the backends.
//
// -large is an image of 300 MB in place of Debian's, whose one file of 50 MB is read
// by itself. What stands beside the backends:
//
//	download   the blob by one GET, into nothing
//	nbdkit     nbdkit curl with its readahead and cache filters, nbdfuse, and the kernel's
//	           erofs on a loop device: the same work by standard parts
//
// Each work of the first table has a mount, a cache directory and an empty page
// cache of its own. ls -lR is what it asks the kernel for (readdir, lstat,
// readlink, the ACL); everything is ls -lR and the content of each file, by one
// reader. The second table reads everything again, out of the cache directory. The
// median of the rounds is printed.
//
// It needs root; a backend that cannot mount here is left out, and said. Without
// -image it needs the network once, for Debian.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/guest"
)

func main() {
	b := &bench{}
	var backends, suite string
	flag.StringVar(&b.binary, "binary", "bin/erofs-oci", "the erofs-oci program")
	flag.StringVar(&b.image, "image", "", "the EROFS image to read (default: one made of Debian)")
	flag.BoolVar(&b.large, "large", false, "read an image of 300 MB with a file of 50 MB")
	flag.Int64Var(&b.wanted, "file", 3<<20, "read the file by itself whose size is next to so many `BYTES`")
	flag.StringVar(&backends, "backends", "nbd,file,fuse", "what to measure; nbdkit is the peer")
	flag.DurationVar(&b.latency, "latency", 20*time.Millisecond, "until the first byte of each answer")
	flag.Int64Var(&b.bandwidth, "bandwidth", 25_000_000, "`BYTES` a second of all answers together")
	flag.IntVar(&b.rounds, "rounds", 3, "the median of so many rounds counts")
	flag.StringVar(&suite, "guest", "", "measure in a guest with the kernel of this `SUITE` of Debian")
	flag.Parse()
	b.backends = strings.Split(backends, ",")
	if err := b.main(context.Background(), suite); err != nil {
		fmt.Fprintln(os.Stderr, "network:", err)
		os.Exit(1)
	}
}

func (b *bench) main(ctx context.Context, suite string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it mounts, and drops the page cache")
	}
	if b.rounds < 1 {
		return errors.New("-rounds must be at least 1")
	}
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "erofs-oci-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	switch {
	case b.large:
		b.wanted = largeFile
		b.image, err = largeImage(ctx, b.dir)
	case b.image == "":
		b.image, err = debianImage(ctx)
	}
	if err != nil {
		return err
	}
	if suite != "" {
		return b.inGuest(ctx, suite)
	}
	return b.run(ctx)
}

func debianImage(ctx context.Context) (string, error) {
	cache, err := guest.Cache()
	if err != nil {
		return "", err
	}
	set, err := guest.DebianImages(ctx, cache)
	if err != nil {
		return "", err
	}
	im, err := set.Get(guest.NetworkImage)
	return set.File(im), err
}

// inGuest boots a kernel and runs this program there.
func (b *bench) inGuest(ctx context.Context, suite string) error {
	cache, err := guest.Cache()
	if err != nil {
		return err
	}
	kernel, err := guest.Fetch(ctx, cache, suite)
	if err != nil {
		return err
	}
	initProgram, self := filepath.Join(b.dir, "init"), filepath.Join(b.dir, "network")
	if err := errors.Join(guest.Build(ctx, initProgram, "build", guest.InitPackage),
		guest.Build(ctx, self, "build", "github.com/erofs-oci/erofs-oci/tests/bench/network")); err != nil {
		return err
	}
	fmt.Printf("In a guest of %s.\n\n", kernel.Package)
	exit, err := kernel.Run(ctx, guest.Job{
		Init:  initProgram,
		Files: map[string]string{"/bin/network": self, "/bin/erofs-oci": b.binary},
		Disks: map[string]string{"image": b.image},
		Argv: []string{"/bin/network", "-binary=/bin/erofs-oci", "-image=/disks/image", "-backends=" + strings.Join(b.backends, ","),
			"-latency=" + b.latency.String(), fmt.Sprintf("-bandwidth=%d", b.bandwidth), fmt.Sprintf("-rounds=%d", b.rounds)},
		Env:    []string{"HOME=/tmp"},
		Memory: 1536,
	}, os.Stdout)
	if err == nil && exit != 0 {
		err = fmt.Errorf("in the guest it ended with status %d", exit)
	}
	return err
}
