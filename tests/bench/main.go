// Command bench measures a mount against its peers in one run: the kernel's own
// erofs on a loop device, and erofsfuse of erofs-utils where it is given. It
// prints tables in Markdown, with ratios, since seconds are a machine's own.
//
//	bench [-binary bin/erofs-oci] [-tree DIR] [-mkfs CMD] [-erofsfuse CMD]
//	      [-images plain,lz4,…] [-works find,read,big,random,many,million,network] [-rounds 3]
//
// It needs root, mkfs.erofs, fio and the kernel's erofs.
//
// The tables of speed mount local images, each work on a new mount, so that nobody
// has anything in memory but what the work itself left there. "Cold" means that
// the page cache was dropped first; "warm" is the same work once more. The
// rounds of the peers are interleaved, and the best of each counts. A second table
// has the processor time of the servers, user and system, which depends less on
// what else the machine does; the kernel's erofs has no server. What fetching
// from a registry costs is a table of its own.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

type bench struct {
	binary, server, tree, mkfs, erofsfuse, dir string
	images, works                              []string
	rounds                                     int
}

func main() {
	b := &bench{}
	var images, works string
	flag.StringVar(&b.binary, "binary", "bin/erofs-oci", "the erofs-oci program")
	flag.StringVar(&b.server, "server", "", "our server: a command that takes -f, IMAGE and DIR (default: BINARY fuse)")
	flag.StringVar(&b.tree, "tree", "", "the `DIR` that images are made of (default: the Go toolchain's)")
	flag.StringVar(&b.mkfs, "mkfs", "mkfs.erofs", "the `CMD` that makes images")
	flag.StringVar(&b.erofsfuse, "erofsfuse", "", "the peer: a `CMD` that takes -f, IMAGE and DIR")
	flag.StringVar(&images, "images", strings.Join(imageNames(), ","), "what images to make")
	flag.StringVar(&works, "works", strings.Join(workNames(), ","), "what to measure")
	flag.StringVar(&b.dir, "dir", "", "keep images in `DIR`, and use those that are there (default: a temporary one)")
	flag.IntVar(&b.rounds, "rounds", 3, "the best of so many rounds counts")
	flag.Parse()
	b.images, b.works = strings.Split(images, ","), strings.Split(works, ",")
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) wants(work string) bool { return slices.Contains(b.works, work) }

func (b *bench) run() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it drops the page cache and mounts with the kernel's erofs")
	}
	for _, n := range b.images {
		if !slices.Contains(imageNames(), n) {
			return fmt.Errorf("no image %q; there are %s", n, strings.Join(imageNames(), ", "))
		}
	}
	for _, n := range b.works {
		if !slices.Contains(workNames(), n) {
			return fmt.Errorf("no work %q; there are %s", n, strings.Join(workNames(), ", "))
		}
	}
	if b.tree == "" {
		goroot, err := exec.Command("go", "env", "GOROOT").Output()
		if err != nil {
			return fmt.Errorf("go env GOROOT: %w", err)
		}
		b.tree = strings.TrimSpace(string(goroot))
	}
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	if b.server == "" {
		b.server = b.binary + " fuse"
	}
	if b.dir == "" {
		if b.dir, err = os.MkdirTemp("", "erofs-oci-bench-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	}
	return b.tables()
}

func (b *bench) tables() error {
	for _, name := range b.images {
		if err := b.speed(name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if !b.wants("network") {
			continue
		}
		path, err := b.image("tree", b.tree, name)
		if err != nil {
			return err
		}
		if err := b.network(name, path); err != nil {
			return fmt.Errorf("%s from a registry: %w", name, err)
		}
	}
	for work, do := range map[string]func() error{"many": b.many, "million": b.million} {
		if !b.wants(work) {
			continue
		}
		if err := do(); err != nil {
			return fmt.Errorf("%s: %w", work, err)
		}
	}
	return nil
}

// command runs a program without a word, or returns what it said.
func command(name string, args ...string) error {
	said, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return nil
}

func shell(script, dir string) error { return command("sh", "-c", script, "sh", dir) }

func timed(f func() error) (time.Duration, error) {
	begin := time.Now()
	err := f()
	return time.Since(begin), err
}

func readAll(dir string) error {
	return shell(`find "$1" -type f -print0 | xargs -0 cat > /dev/null`, dir)
}

func find(dir string) error { return shell(`find "$1" -printf '%p %s %m\n' > /dev/null`, dir) }

func dropCaches() error {
	return errors.Join(command("sync"), os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}
