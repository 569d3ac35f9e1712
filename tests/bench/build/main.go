// Command build measures erofsfmt/mkerofs against mkfs.erofs: both make an image of
// the same tree and of the same tar archive, with the same algorithm and cluster
// size, and what a mount of each from a registry costs is counted. It prints tables
// in Markdown.
//
//	build [-mkfs CMD] [-tree DIR] [-kinds lz4,zstd,…] [-rounds 1] [-workers N]
//	      [-works tree,tar,network] [-binary bin/erofs-oci] [-dir DIR]
//
// CMD is a mkfs.erofs; "debian", the default, is the one of Debian unstable, which
// needs root and, once, the network.
//
// Each build is a process of its own, this program again for ours, so that seconds,
// processor seconds (user and system) and the largest resident set are what wait4(2)
// says. The inputs are read once before, so that nobody waits for a disk; images are
// written to a directory in /tmp, or to -dir. The rounds of the two are interleaved
// and the best of each figure counts. A machine that does other work, too, spoils
// the seconds; the processor seconds less.
//
// The works are "tree", the image of the directory; "tar", that of an archive of it,
// beside the time of tar -xf to a tmpfs; and "network", the GETs and bytes of ls -lR
// and of one file of 4 KiB, each through a new mount of an image from a registry in
// this process. tar and network need root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"

	"github.com/erofs-oci/erofs-oci/tests/debian"
)

type bench struct {
	mkfs, tree, binary, dir string
	kinds, works            []string
	rounds, workers         int

	peer func(ctx context.Context, args ...string) *exec.Cmd // mkfs.erofs
}

func main() {
	b := &bench{}
	var kinds, works, ours, profile string
	flag.StringVar(&b.mkfs, "mkfs", "debian", "the peer, a `CMD`, or debian for the one of Debian unstable")
	flag.StringVar(&b.tree, "tree", "", "the `DIR` that images are made of (default: the Go toolchain's)")
	flag.StringVar(&kinds, "kinds", "plain,lz4,lz4hc,zstd,deflate", "what images to make")
	flag.StringVar(&works, "works", "tree,tar,network", "what to measure")
	flag.IntVar(&b.rounds, "rounds", 1, "the best of so many rounds counts")
	flag.IntVar(&b.workers, "workers", 0, "how many threads each has for compression (default: its own choice)")
	flag.StringVar(&b.binary, "binary", "bin/erofs-oci", "the program that mounts, for the network")
	flag.StringVar(&b.dir, "dir", "", "write images to `DIR` and leave them there (default: a temporary one)")
	flag.StringVar(&ours, "ours", "", "build one image with our library, and nothing else: `KIND`; arguments are the image and its source")
	flag.StringVar(&profile, "cpuprofile", "", "with -ours: write a profile of the processor time to `FILE`")
	flag.Parse()
	b.kinds, b.works = strings.Split(kinds, ","), strings.Split(works, ",")
	do := b.main
	if ours != "" {
		do = func(ctx context.Context) error {
			return profiled(profile, func() error { return build(ctx, ours, b.workers, flag.Args()) })
		}
	}
	if err := do(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1)
	}
}

// profiled does it, and writes a profile of that to a file if there is to be one.
func profiled(file string, do func() error) (err error) {
	if file == "" {
		return do()
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	return do()
}

func (b *bench) main(ctx context.Context) (err error) {
	for _, k := range b.kinds {
		if _, ok := allKinds()[k]; !ok {
			return fmt.Errorf("no kind %q of image", k)
		}
	}
	for _, w := range b.works {
		if !slices.Contains([]string{"tree", "tar", "network"}, w) {
			return fmt.Errorf("no work %q; there are tree, tar and network", w)
		}
	}
	if b.rounds < 1 {
		return errors.New("-rounds must be at least 1")
	}
	if err := b.findPeer(ctx); err != nil {
		return err
	}
	if b.tree == "" {
		goroot, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
		if err != nil {
			return fmt.Errorf("go env GOROOT: %w", err)
		}
		b.tree = strings.TrimSpace(string(goroot))
	}
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	if b.dir == "" {
		if b.dir, err = os.MkdirTemp("", "erofs-oci-bench-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	}
	return b.tables(ctx)
}

func (b *bench) findPeer(ctx context.Context) error {
	if b.mkfs != "debian" {
		words := strings.Fields(b.mkfs)
		b.peer = func(ctx context.Context, args ...string) *exec.Cmd {
			return exec.CommandContext(ctx, words[0], append(words[1:len(words):len(words)], args...)...)
		}
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("mkfs.erofs of Debian unstable needs root to be unpacked; name another with -mkfs")
	}
	utils, err := debian.FetchUtils(ctx)
	b.peer = func(ctx context.Context, args ...string) *exec.Cmd { return utils.Command(ctx, "mkfs.erofs", args...) }
	return err
}

func (b *bench) wants(work string) bool { return slices.Contains(b.works, work) }

func (b *bench) tables(ctx context.Context) error {
	said, err := b.peer(ctx, "--version").Output()
	if err != nil {
		return fmt.Errorf("mkfs.erofs --version: %w", err)
	}
	version, _, _ := strings.Cut(string(said), "\n")
	fmt.Printf("The peer is %s.\n\n", version)
	if b.wants("tree") {
		if err := b.trees(ctx); err != nil {
			return err
		}
	}
	if b.wants("tar") {
		if err := b.archives(ctx); err != nil {
			return fmt.Errorf("of an archive: %w", err)
		}
	}
	if b.wants("network") {
		return b.network(ctx)
	}
	return nil
}
