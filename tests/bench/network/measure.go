package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

type bench struct {
	binary, image, dir string
	backends           []string
	latency            time.Duration
	bandwidth          int64
	rounds             int
	large              bool
	wanted             int64 // the size of the file whose reading is a work of its own

	registry *fakeregistry.Registry
	ref      string
	blob     string // its URL
	size     int64  // of the image
	// usable are the backends that can mount here.
	usable []string
	// file is the one whose reading is a work of its own, and how long it is.
	file     string
	fileSize int64
}

// A cost is what something took.
type cost struct {
	time  time.Duration
	gets  int
	bytes int64 // fetched
	read  int64 // of files, by the work
}

func (c cost) String() string {
	s := fmt.Sprintf("%.2f s, %d GETs, %.1f MB", c.time.Seconds(), c.gets, float64(c.bytes)/1e6)
	if c.read > 0 {
		s += fmt.Sprintf(" (%.2f of what is read)", float64(c.bytes)/float64(c.read))
	}
	return s
}

func median(all []cost) cost {
	slices.SortFunc(all, func(a, b cost) int { return cmp.Compare(a.time, b.time) })
	return all[len(all)/2]
}

func (b *bench) run(ctx context.Context) (err error) {
	if err := b.push(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.registry.Close()) }()
	if err := b.explore(); err != nil {
		return err
	}
	b.registry.SetLatency(b.latency)
	b.registry.SetBandwidth(b.bandwidth)
	if err := b.network(); err != nil {
		return err
	}
	return b.cached()
}

// push puts the image into a registry of its own.
func (b *bench) push(ctx context.Context) error {
	r, err := fakeregistry.New(fakeregistry.Options{Dir: b.dir})
	if err != nil {
		return err
	}
	f, err := os.Open(b.image)
	if err != nil {
		return errors.Join(err, r.Close())
	}
	defer f.Close()
	// stat(2) does not know it of a device.
	if b.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return errors.Join(err, r.Close())
	}
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: b.size}
	d, err := digest.FromReader(io.NewSectionReader(f, 0, b.size))
	if err != nil {
		return errors.Join(err, r.Close())
	}
	if _, err := ocipush.Push(ctx, r.URL(), "bench/image:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		return errors.Join(err, r.Close())
	}
	b.registry, b.ref = r, r.Addr()+"/bench/image:v1"
	b.blob = r.URL() + "/v2/bench/image/blobs/" + d.String()
	return nil
}

// explore finds out what can be mounted here, and what there is to read; it prints
// what the figures are of.
func (b *bench) explore() error {
	var entries int
	for _, backend := range b.backends {
		m, err := b.mount(backend)
		if err != nil {
			fmt.Fprintf(os.Stderr, "network: %s is left out: %v\n", backend, err)
			continue
		}
		b.usable = append(b.usable, backend)
		b.file, b.fileSize, entries, err = survey(m.dir, b.wanted)
		if err := errors.Join(err, m.end()); err != nil {
			return err
		}
	}
	if b.usable == nil {
		return errors.New("no backend can mount here")
	}
	fmt.Printf("%.1f MB, %d entries; %v, %.0f MB/s; median of %d rounds.\n\n",
		float64(b.size)/1e6, entries, b.latency, float64(b.bandwidth)/1e6, b.rounds)
	return nil
}

// A mounted is a mount with a cache directory of its own.
type mounted struct {
	bench      *bench
	dir, cache string
	cost       cost
	peer       *peer // nil: erofs-oci
}

// mount mounts with nothing in any cache, and counts from zero.
func (b *bench) mount(backend string) (*mounted, error) {
	m := &mounted{bench: b}
	var err error
	if m.dir, err = os.MkdirTemp(b.dir, "mnt-"); err != nil {
		return nil, err
	}
	if m.cache, err = os.MkdirTemp(b.dir, "cache-"); err != nil {
		return nil, err
	}
	if err := dropCaches(); err != nil {
		return nil, err
	}
	m.cost, err = m.measure(func() (int64, error) {
		if backend == nbdkit {
			var err error
			m.peer, err = startPeer(b.blob, m.cache, m.dir)
			return 0, err
		}
		return 0, command(b.binary, "mount", "--backend="+backend, "--cache-dir="+m.cache, b.ref, m.dir)
	})
	return m, err
}

// measure counts what f asks the registry for.
func (m *mounted) measure(f func() (read int64, err error)) (cost, error) {
	m.bench.registry.ResetStats()
	begin := time.Now()
	read, err := f()
	took := time.Since(begin)
	s := m.bench.registry.Stats()
	return cost{took, s.BlobGETs, s.BlobBytes, read}, err
}

func (m *mounted) end() error {
	if m.peer != nil {
		return errors.Join(m.peer.end(), os.RemoveAll(m.cache), os.Remove(m.dir))
	}
	return errors.Join(command(m.bench.binary, "umount", m.dir), os.RemoveAll(m.cache), os.Remove(m.dir))
}

// command runs a program without a word, or returns what it said.
func command(name string, args ...string) error {
	said, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return nil
}

func dropCaches() error { return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0) }

// A work is what is done in a mounted directory.
type work struct {
	name string
	do   func(dir string) (read int64, err error)
}

func (b *bench) works() []work {
	return []work{
		{"`ls -lR`", list},
		{fmt.Sprintf("a file of %.1f MB", float64(b.fileSize)/1e6), func(dir string) (int64, error) {
			return read(filepath.Join(dir, b.file))
		}},
		{"everything", readAll},
	}
}

// network prints what each work costs on a mount of its own.
func (b *bench) network() error {
	fmt.Print("| over the network | mount |")
	for _, w := range b.works() {
		fmt.Printf(" %s |", w.name)
	}
	fmt.Printf("\n|---|---|%s\n", strings.Repeat("---|", len(b.works())))
	for _, backend := range b.usable {
		var mounts, each []cost
		for _, w := range b.works() {
			var rounds []cost
			for range b.rounds {
				mount, then, err := b.once(backend, w)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", backend, w.name, err)
				}
				mounts, rounds = append(mounts, mount), append(rounds, then)
			}
			each = append(each, median(rounds))
		}
		fmt.Printf("| %s | %v |", backend, median(mounts))
		for _, c := range each {
			fmt.Printf(" %v |", c)
		}
		fmt.Println()
	}
	plain, err := b.download()
	if err != nil {
		return err
	}
	fmt.Printf("\nA plain download: %v. Load of the machine: %s.\n\n", plain, load())
	return nil
}

// once is one round of one work: what the mount costs, and what follows.
func (b *bench) once(backend string, w work) (mount, then cost, err error) {
	m, err := b.mount(backend)
	if err != nil {
		return cost{}, cost{}, err
	}
	then, err = m.measure(func() (int64, error) { return w.do(m.dir) })
	return m.cost, then, errors.Join(err, m.end())
}

// cached prints how long it takes to read everything when the blob is here: what
// the server has in its cache directory, and what the kernel has in its page cache.
func (b *bench) cached() error {
	fmt.Print("| everything, once more | cold page cache | warm page cache |\n|---|---|---|\n")
	for _, backend := range b.usable {
		m, err := b.mount(backend)
		if err != nil {
			return err
		}
		cold, warm, err := m.again(b.rounds)
		if err := errors.Join(err, m.end()); err != nil {
			return fmt.Errorf("%s: %w", backend, err)
		}
		if cold.gets+warm.gets > 0 && backend != nbdkit {
			return fmt.Errorf("%s: reading everything once more took %d GETs", backend, cold.gets+warm.gets)
		}
		fmt.Printf("| %s | %.2f s | %.2f s |\n", backend, cold.time.Seconds(), warm.time.Seconds())
	}
	fmt.Println()
	return nil
}

// again reads everything once, and then in each state of the page cache.
func (m *mounted) again(rounds int) (cold, warm cost, err error) {
	if _, err := readAll(m.dir); err != nil {
		return cost{}, cost{}, err
	}
	var colds, warms []cost
	for range rounds {
		if err := dropCaches(); err != nil {
			return cost{}, cost{}, err
		}
		for _, into := range []*[]cost{&colds, &warms} {
			c, err := m.measure(func() (int64, error) { return readAll(m.dir) })
			if err != nil {
				return cost{}, cost{}, err
			}
			*into = append(*into, c)
		}
	}
	return median(colds), median(warms), nil
}
