package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A cost is what one process took.
type cost struct {
	wall, cpu time.Duration
	memory    int64 // the largest resident set, in bytes
	size      int64 // of the image
}

// best takes the least of each; they may come from different rounds.
func (c cost) best(d cost) cost {
	if c.wall == 0 {
		return d
	}
	return cost{min(c.wall, d.wall), min(c.cpu, d.cpu), min(c.memory, d.memory), d.size}
}

// run runs a command, which says nothing, and measures it.
func run(cmd *exec.Cmd, image string) (cost, error) {
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	begin := time.Now()
	err := cmd.Run()
	c := cost{wall: time.Since(begin)}
	if err != nil {
		return c, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, said.String())
	}
	state := cmd.ProcessState
	usage, ok := state.SysUsage().(*syscall.Rusage)
	if !ok {
		return c, fmt.Errorf("%T is no usage of resources", state.SysUsage())
	}
	c.cpu = state.UserTime() + state.SystemTime()
	c.memory = usage.Maxrss * 1024
	if image == "" {
		return c, nil
	}
	st, err := os.Stat(image)
	if err == nil {
		c.size = st.Size()
	}
	return c, err
}

func (b *bench) image(kind, who string) string { return filepath.Join(b.dir, kind+"-"+who+".erofs") }

// ours and theirs make an image of a source, which may be a directory or an archive.
func (b *bench) ours(ctx context.Context, kind, source string) (cost, error) {
	self, err := os.Executable()
	if err != nil {
		return cost{}, err
	}
	image := b.image(kind, "ours")
	if err := os.RemoveAll(image); err != nil {
		return cost{}, err
	}
	return run(exec.CommandContext(ctx, self, "-ours="+kind, "-workers="+strconv.Itoa(b.workers), image, source), image)
}

func (b *bench) theirs(ctx context.Context, kind, source string, more ...string) (cost, error) {
	image := b.image(kind, "theirs")
	args := append([]string{"--quiet"}, allKinds()[kind].flags...)
	if b.workers > 0 {
		args = append(args, "--workers="+strconv.Itoa(b.workers))
	}
	args = append(append(args, more...), image, source)
	if err := os.RemoveAll(image); err != nil {
		return cost{}, err
	}
	return run(b.peer(ctx, args...), image)
}

// compare interleaves the rounds of the two, of one kind and source, and prints a row.
func (b *bench) compare(ctx context.Context, kind, source string, more ...string) error {
	var us, them cost
	for range b.rounds {
		c, err := b.ours(ctx, kind, source)
		if err != nil {
			return err
		}
		us = us.best(c)
		if c, err = b.theirs(ctx, kind, source, more...); err != nil {
			return err
		}
		them = them.best(c)
	}
	ratio := func(a, b float64) string { return fmt.Sprintf("%.2f", a/b) }
	fmt.Printf("| %s | %.2f | %.2f | %s | %.2f | %.2f | %s | %.0f | %.0f | %s | %.1f | %.1f | %.3f |\n", allKinds()[kind].name,
		us.wall.Seconds(), them.wall.Seconds(), ratio(us.wall.Seconds(), them.wall.Seconds()),
		us.cpu.Seconds(), them.cpu.Seconds(), ratio(us.cpu.Seconds(), them.cpu.Seconds()),
		float64(us.memory)/(1<<20), float64(them.memory)/(1<<20), ratio(float64(us.memory), float64(them.memory)),
		float64(us.size)/1e6, float64(them.size)/1e6, float64(us.size)/float64(them.size))
	return nil
}

func header(what string) {
	fmt.Printf("| %s | s | mkfs.erofs | ratio | CPU s | mkfs.erofs | ratio | MiB of memory | mkfs.erofs | ratio | MB | mkfs.erofs | ratio |\n", what)
	fmt.Println("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
}

// trees prints a table of images of the directory.
func (b *bench) trees(ctx context.Context) error {
	if err := warm(b.tree); err != nil {
		return err
	}
	header("of a directory")
	for _, kind := range b.kinds {
		if err := b.compare(ctx, kind, b.tree); err != nil {
			return err
		}
	}
	fmt.Printf("\nLoad %s.\n\n", loadAverage())
	return nil
}

// archives prints the same of a tar archive, and how long it takes to unpack that.
func (b *bench) archives(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it mounts a tmpfs")
	}
	archive := filepath.Join(b.dir, "tree.tar")
	if _, err := run(exec.CommandContext(ctx, "tar", "-cf", archive, "-C", b.tree, "."), ""); err != nil {
		return err
	}
	header("of a tar archive")
	for _, kind := range b.kinds {
		if err := b.compare(ctx, kind, archive, "--tar=f"); err != nil {
			return err
		}
	}
	var unpacked cost
	for range b.rounds {
		c, err := b.unpack(ctx, archive)
		if err != nil {
			return err
		}
		unpacked = unpacked.best(c)
	}
	fmt.Printf("\n`tar -xf` to a tmpfs: %.2f s, %.2f s CPU. Load %s.\n\n", unpacked.wall.Seconds(), unpacked.cpu.Seconds(), loadAverage())
	return nil
}

// unpack unpacks an archive into memory.
func (b *bench) unpack(ctx context.Context, archive string) (_ cost, err error) {
	dir, err := os.MkdirTemp(b.dir, "tmpfs-")
	if err != nil {
		return cost{}, err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		return cost{}, fmt.Errorf("mount a tmpfs: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0), os.Remove(dir)) }()
	return run(exec.CommandContext(ctx, "tar", "-xf", archive, "-C", dir), "")
}

// warm reads all files of a tree, so that they are in the page cache.
func warm(tree string) error {
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(io.Discard, f)
		return err
	})
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}
