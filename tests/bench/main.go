// Command bench measures a mount against its peers in one run: the kernel's own
// erofs on a loop device, and erofsfuse of erofs-utils where it is given. It
// prints tables in Markdown, with ratios, since seconds are a machine's own.
//
//	bench [-binary bin/erofs-oci] [-tree DIR] [-erofsfuse PATH] [-rounds 3]
//
// It needs root, mkfs.erofs and the kernel's erofs. "Cold" means that the page
// cache was dropped; the blob has been fetched by then. What fetching costs is a
// table of its own.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

type bench struct {
	binary, tree, erofsfuse, dir string
	rounds                       int
}

func main() {
	b := &bench{}
	flag.StringVar(&b.binary, "binary", "bin/erofs-oci", "the erofs-oci program")
	flag.StringVar(&b.tree, "tree", "", "the `DIR` that images are made of (default: the Go toolchain's)")
	flag.StringVar(&b.erofsfuse, "erofsfuse", "", "the peer: a command that takes IMAGE and DIR")
	flag.IntVar(&b.rounds, "rounds", 3, "the best of so many rounds counts")
	flag.Parse()
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it drops the page cache and mounts with the kernel's erofs")
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
	if b.dir, err = os.MkdirTemp("", "erofs-oci-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	for _, image := range []struct {
		name  string
		flags []string
	}{{"plain", nil}, {"lz4, 4 KiB", []string{"-zlz4"}}, {"lz4hc, 64 KiB", []string{"-zlz4hc", "-C65536"}}} {
		if err := b.image(image.name, image.flags); err != nil {
			return fmt.Errorf("%s: %w", image.name, err)
		}
	}
	return nil
}

func (b *bench) image(name string, flags []string) error {
	path := filepath.Join(b.dir, "image.erofs")
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	if err := command("mkfs.erofs", append(append([]string{"--quiet"}, flags...), path, b.tree)...); err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	fmt.Printf("## %s (%s, %.0f MB)\n\n", name, b.tree, float64(st.Size())/1e6)
	if err := b.network(path, st.Size()); err != nil {
		return err
	}
	return b.compare(path, st.Size())
}

// command runs a program without a word, or returns what it said.
func command(name string, args ...string) error {
	said, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return nil
}

func timed(f func() error) (time.Duration, error) {
	begin := time.Now()
	err := f()
	return time.Since(begin), err
}

// serve puts the image into a registry of its own.
func (b *bench) serve(path string, size int64) (*fakeregistry.Registry, string, error) {
	r, err := fakeregistry.New(fakeregistry.Options{Dir: b.dir})
	if err != nil {
		return nil, "", err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	defer f.Close()
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: size}
	if _, err := ocipush.Push(context.Background(), r.URL(), "bench/image:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	r.ResetStats()
	return r, r.Addr() + "/bench/image:v1", nil
}

func (b *bench) mount(ref, dir string) error {
	return command(b.binary, "mount", "--cache-dir", filepath.Join(b.dir, "cache"), ref, dir)
}

// network prints what each step costs in GETs, bytes and time, each from nothing.
func (b *bench) network(path string, size int64) (err error) {
	r, ref, err := b.serve(path, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	small, err := fileOfSize(b.tree, 4096)
	if err != nil {
		return err
	}
	fmt.Print("| after mounting | GETs | MB fetched | of the image | mount | then |\n|---|---|---|---|---|---|\n")
	for _, step := range []struct {
		name string
		do   func(dir string) error
	}{
		{"nothing", func(string) error { return nil }},
		{"`ls -lR`", func(dir string) error { return shell(`ls -lR "$1" > /dev/null`, dir) }},
		{"one 4 KiB file", func(dir string) error { return shell(`cat "$1" > /dev/null`, filepath.Join(dir, small)) }},
		{"all files", readAll},
	} {
		r.ResetStats()
		dir, err := os.MkdirTemp(b.dir, "mnt-")
		if err != nil {
			return err
		}
		mount, err := timed(func() error { return b.mount(ref, dir) })
		if err != nil {
			return err
		}
		then, err := timed(func() error { return step.do(dir) })
		if err := errors.Join(err, command(b.binary, "umount", dir)); err != nil {
			return err
		}
		s := r.Stats()
		fmt.Printf("| %s | %d | %.2f | %.1f %% | %d ms | %.2f s |\n", step.name, s.BlobGETs, float64(s.BlobBytes)/1e6,
			100*float64(s.BlobBytes)/float64(size), mount.Milliseconds(), then.Seconds())
	}
	fmt.Println()
	return nil
}

func shell(script, dir string) error { return command("sh", "-c", script, "sh", dir) }

func readAll(dir string) error {
	return shell(`find "$1" -type f -print0 | xargs -0 cat > /dev/null`, dir)
}

func find(dir string) error { return shell(`find "$1" -printf '%p %s %m\n' > /dev/null`, dir) }

// fileOfSize finds a file that is about as large as size.
func fileOfSize(tree string, size int64) (string, error) {
	best, gap := "", int64(1<<62)
	err := filepath.Walk(tree, func(path string, info os.FileInfo, err error) error {
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		if d := max(info.Size()-size, size-info.Size()); d < gap {
			best, gap = path, d
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return filepath.Rel(tree, best)
}

// A candidate is one way to mount the image.
type candidate struct {
	name     string
	dir      string
	attach   func(dir string) error
	detach   func(dir string) error
	measured map[string]time.Duration
}

func (b *bench) candidates(path, ref string) []*candidate {
	umount := func(dir string) error { return command("umount", dir) }
	all := []*candidate{
		{name: "erofs-oci", attach: func(dir string) error { return errors.Join(b.mount(ref, dir), readAll(dir)) },
			detach: func(dir string) error { return command(b.binary, "umount", dir) }},
		{name: "kernel", attach: func(dir string) error { return command("mount", "-t", "erofs", "-o", "ro,loop", path, dir) }, detach: umount},
	}
	if b.erofsfuse != "" {
		words := strings.Fields(b.erofsfuse)
		all = append(all, &candidate{name: "erofsfuse", detach: umount,
			attach: func(dir string) error { return command(words[0], append(words[1:], path, dir)...) }})
	}
	return all
}

// compare times each work on each candidate, the rounds interleaved.
func (b *bench) compare(path string, size int64) (err error) {
	r, ref, err := b.serve(path, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	all := b.candidates(path, ref)
	for _, c := range all {
		c.measured = make(map[string]time.Duration)
		if c.dir, err = os.MkdirTemp(b.dir, "mnt-"); err != nil {
			return err
		}
		if err := c.attach(c.dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.detach(c.dir)) }()
	}
	for range b.rounds {
		for _, c := range all {
			if err := c.round(); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	printTable(all)
	return nil
}

// works are what is timed. Each warm one follows its cold one.
func works() []string {
	return []string{"find, cold", "find, warm", "read all, cold", "read all, warm"}
}

func (c *candidate) round() error {
	for _, w := range works() {
		if strings.HasSuffix(w, "cold") {
			if err := dropCaches(); err != nil {
				return err
			}
		}
		do := find
		if strings.HasPrefix(w, "read") {
			do = readAll
		}
		took, err := timed(func() error { return do(c.dir) })
		if err != nil {
			return err
		}
		if best, ok := c.measured[w]; !ok || took < best {
			c.measured[w] = took
		}
	}
	return nil
}

func dropCaches() error {
	return errors.Join(command("sync"), os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

func printTable(all []*candidate) {
	names := slices.Collect(func(yield func(string) bool) {
		for _, c := range all {
			if !yield(c.name) {
				return
			}
		}
	})
	fmt.Printf("| seconds | %s |", strings.Join(names, " | "))
	for _, n := range names[1:] {
		fmt.Printf(" %s / %s |", names[0], n)
	}
	fmt.Printf("\n|---|%s\n", strings.Repeat("---|", 2*len(all)-1))
	for _, w := range works() {
		fmt.Printf("| %s |", w)
		for _, c := range all {
			fmt.Printf(" %.3f |", c.measured[w].Seconds())
		}
		for _, c := range all[1:] {
			fmt.Printf(" %.2f |", all[0].measured[w].Seconds()/c.measured[w].Seconds())
		}
		fmt.Println()
	}
	fmt.Println()
}
