// Command nbd measures erofs-oci serve against its peers, nbdkit's file plugin and
// qemu-nbd, in one run: each serves the same fully cached file on a Unix socket. It
// prints tables in Markdown, with ratios, since seconds are a machine's own.
//
//	nbd [-binary bin/erofs-oci] [-size 1073741824] [-rounds 5] [-seconds 3]
//
// It needs nbdcopy, fio with its nbd engine, nbdkit and qemu-nbd. The rounds are
// interleaved and the median counts.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
)

type bench struct {
	binary, dir     string
	size            int64
	rounds, seconds int
}

func main() {
	b := &bench{}
	flag.StringVar(&b.binary, "binary", "bin/erofs-oci", "the erofs-oci program")
	flag.Int64Var(&b.size, "size", 1<<30, "`BYTES` of the blob")
	flag.IntVar(&b.rounds, "rounds", 5, "the median of so many rounds counts")
	flag.IntVar(&b.seconds, "seconds", 3, "how long each fio run takes")
	flag.Parse()
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run() (err error) {
	if b.binary, err = filepath.Abs(b.binary); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "erofs-oci-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	file := filepath.Join(b.dir, "blob")
	if err := fill(file, b.size); err != nil {
		return err
	}
	r, ref, err := b.push(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	all := b.candidates(file, ref)
	for _, c := range all {
		if err := c.start(); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		defer func() { err = errors.Join(err, c.stop()) }()
		// Everything is in the cache, and in the page cache, after this.
		if err := command("nbdcopy", c.uri, "null:"); err != nil {
			return err
		}
	}
	for range b.rounds {
		for _, c := range all {
			for _, w := range b.works() {
				values, err := w.measure(c.uri)
				if err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				for i, f := range w.figures {
					c.measured[f] = append(c.measured[f], values[i])
				}
			}
		}
	}
	b.print(all)
	return nil
}

// fill makes a file of bytes that nobody can compress or leave out.
func fill(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{1}), size)
	return errors.Join(err, f.Close())
}

// push puts the file into a registry of its own.
func (b *bench) push(path string) (*fakeregistry.Registry, string, error) {
	r, err := fakeregistry.New(fakeregistry.Options{Dir: b.dir})
	if err != nil {
		return nil, "", err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	defer f.Close()
	layer := ocipush.Layer{MediaType: registry.MediaTypeErofs, Data: f, Size: b.size}
	if _, err := ocipush.Push(context.Background(), r.URL(), "bench/blob:v1", []ocipush.Layer{layer}, ocipush.Options{}); err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	return r, r.Addr() + "/bench/blob:v1", nil
}

// command runs a program without a word, or returns what it said.
func command(name string, args ...string) error {
	said, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return nil
}

// A candidate is a server of the file.
type candidate struct {
	name, socket, uri string
	activated         bool // takes its socket from us, as from systemd
	cmd               *exec.Cmd
	measured          map[figure][]float64
}

func (b *bench) candidates(file, ref string) []*candidate {
	serve := func(name string, activated bool, args func(socket string) []string) *candidate {
		socket := filepath.Join(b.dir, name+".socket")
		words := args(socket)
		if activated {
			words = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`}, words...)
		}
		c := &candidate{name: name, socket: socket, uri: "nbd+unix:///?socket=" + socket, activated: activated,
			cmd: exec.Command(words[0], words[1:]...), measured: make(map[figure][]float64)}
		c.cmd.Stderr = os.Stderr
		return c
	}
	return []*candidate{
		serve("erofs-oci", false, func(socket string) []string {
			return []string{b.binary, "serve", "--nbd", "unix:" + socket, "--cache-dir", filepath.Join(b.dir, "cache"), ref}
		}),
		serve("nbdkit", true, func(string) []string {
			return []string{"nbdkit", "--foreground", "--readonly", "file", file}
		}),
		serve("qemu-nbd", true, func(string) []string {
			return []string{"qemu-nbd", "--read-only", "--format=raw", "--persistent", "--shared=16", file}
		}),
	}
}

// start returns when clients can connect: when erofs-oci says so; with the peers,
// who say nothing, at once, since the socket is there before them.
func (c *candidate) start() error {
	if !c.activated {
		out, err := c.cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := c.cmd.Start(); err != nil {
			return err
		}
		_, err = bufio.NewReader(out).ReadString('\n')
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.socket, Net: "unix"})
	if err != nil {
		return err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()
	c.cmd.ExtraFiles = []*os.File{f}
	c.cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
	return c.cmd.Start()
}

func (c *candidate) stop() error {
	if err := c.cmd.Process.Signal(os.Interrupt); err != nil {
		return err
	}
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}

// A work is something to run, and a figure for each of its columns.
type work struct {
	figures []figure
	measure func(uri string) ([]float64, error)
}

type figure struct{ name, unit string }

func (b *bench) works() []work {
	copied := func(connections int) work {
		n := strconv.Itoa(connections)
		return work{[]figure{{"nbdcopy, connections: " + n, "MB/s"}}, func(uri string) ([]float64, error) {
			begin := time.Now()
			err := command("nbdcopy", "--connections="+n, "--threads="+n, uri, "null:")
			return []float64{float64(b.size) / 1e6 / time.Since(begin).Seconds()}, err
		}}
	}
	random := func(depth int) work {
		name := fmt.Sprintf("fio 4 KiB random, depth %d", depth)
		return work{[]figure{{name, "reads/s"}, {name, "µs on average"}}, func(uri string) ([]float64, error) { return b.fio(uri, depth) }}
	}
	return []work{copied(1), copied(8), random(1), random(32)}
}

// fioReport is the part of fio's JSON that is looked at.
type fioReport struct {
	Jobs []struct {
		Error int `json:"error"`
		Read  struct {
			IOPS  float64 `json:"iops"`
			LatNs struct {
				Mean float64 `json:"mean"`
			} `json:"lat_ns"`
		} `json:"read"`
	} `json:"jobs"`
}

// fio gives reads a second and the mean latency in microseconds.
func (b *bench) fio(uri string, depth int) ([]float64, error) {
	cmd := exec.Command("fio", "--name=nbd", "--ioengine=nbd", "--uri="+uri, "--rw=randread", "--bs=4k",
		"--iodepth="+strconv.Itoa(depth), "--size="+strconv.FormatInt(b.size, 10), "--time_based",
		"--runtime="+strconv.Itoa(b.seconds), "--randseed=1", "--output-format=json")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("fio: %w: %s", err, said.String())
	}
	// fio's engine puts lines of its own before the JSON.
	if i := bytes.IndexByte(out, '{'); i > 0 {
		out = out[i:]
	}
	var r fioReport
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("fio: %w in %.200q", err, out)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return nil, fmt.Errorf("fio: %+v", r.Jobs)
	}
	return []float64{r.Jobs[0].Read.IOPS, r.Jobs[0].Read.LatNs.Mean / 1e3}, nil
}

func (b *bench) print(all []*candidate) {
	fmt.Printf("%d MB, Unix sockets, median of %d rounds\n\n|  |  |", b.size/1e6, b.rounds)
	for _, c := range all {
		fmt.Printf(" %s |", c.name)
	}
	for _, c := range all[1:] {
		fmt.Printf(" %s / %s |", all[0].name, c.name)
	}
	fmt.Printf("\n|---|---|%s\n", strings.Repeat("---|", 2*len(all)-1))
	for _, w := range b.works() {
		for _, f := range w.figures {
			f.print(all)
		}
	}
}

func (f figure) print(all []*candidate) {
	fmt.Printf("| %s | %s |", f.name, f.unit)
	for _, c := range all {
		fmt.Printf(" %.0f |", median(c.measured[f]))
	}
	for _, c := range all[1:] {
		fmt.Printf(" %.2f |", median(all[0].measured[f])/median(c.measured[f]))
	}
	fmt.Println()
}

func median(all []float64) float64 {
	s := slices.Sorted(slices.Values(all))
	return s[len(s)/2]
}
