package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A peer is one way to mount an image.
type peer struct {
	name   string
	server []string // takes -f, IMAGE and DIR; nil for the kernel
	best   map[string]cost
}

// A cost is the time of a work, and what of the processors the server took for it.
type cost struct{ wall, cpu time.Duration }

func (b *bench) peers() []*peer {
	all := []*peer{
		{name: "erofs-oci", server: strings.Fields(b.server)},
		{name: "kernel"},
	}
	if b.erofsfuse != "" {
		all = append(all, &peer{name: "erofsfuse", server: strings.Fields(b.erofsfuse)})
	}
	for _, p := range all {
		p.best = make(map[string]cost)
	}
	return all
}

// keep remembers the best of each work; wall and processor time may come from
// different rounds.
func (p *peer) keep(work string, c cost) {
	if old, ok := p.best[work]; ok {
		c = cost{min(old.wall, c.wall), min(old.cpu, c.cpu)}
	}
	p.best[work] = c
}

// A mounted is an image on a directory, with its server if it has one.
type mounted struct {
	dir string
	cmd *exec.Cmd
}

func (p *peer) mount(image, dir string) (*mounted, error) {
	if p.server == nil {
		return &mounted{dir: dir}, command("mount", "-t", "erofs", "-o", "ro,loop", image, dir)
	}
	m := &mounted{dir: dir, cmd: exec.Command(p.server[0], append(p.server[1:len(p.server):len(p.server)], "-f", image, dir)...)}
	var said bytes.Buffer
	m.cmd.Stdout, m.cmd.Stderr = &said, &said
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	if err := waitForMount(dir); err != nil {
		return nil, errors.Join(err, m.cmd.Process.Kill(), m.cmd.Wait(), errors.New(said.String()))
	}
	return m, nil
}

// mountPatience is how long a server may take to mount.
const mountPatience = 10 * time.Second

// waitForMount returns when something is mounted on dir: the kernel says when its
// list of mounts has changed.
func waitForMount(dir string) error {
	// Not os.Open: its poller would take the change for itself.
	fd, err := unix.Open("/proc/self/mounts", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(mountPatience); time.Now().Before(deadline); {
		list, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			return err
		}
		if bytes.Contains(list, []byte(" "+dir+" ")) {
			return nil
		}
		changed := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if _, err := unix.Poll(changed, int(mountPatience.Milliseconds())); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
	}
	return fmt.Errorf("nothing was mounted on %s in %v", dir, mountPatience)
}

func (m *mounted) end() error {
	err := command("umount", m.dir)
	if m.cmd != nil {
		err = errors.Join(err, m.cmd.Wait())
	}
	return err
}

// cpu is what the server has taken of the processors since it began.
func (m *mounted) cpu() (time.Duration, error) {
	if m.cmd == nil {
		return 0, nil
	}
	stat, err := m.proc("stat")
	if err != nil {
		return 0, err
	}
	// The fields follow the name, which may contain anything, in parentheses.
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	var ticks int64
	for _, field := range fields[11:13] { // utime and stime
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil
}

// memory is the server's largest resident set so far.
func (m *mounted) memory() (string, error) {
	if m.cmd == nil {
		return "", nil
	}
	status, err := m.proc("status")
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(status, "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	return fmt.Sprintf("%.0f MiB", float64(kib)/1024), err
}

func (m *mounted) proc(name string) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", m.cmd.Process.Pid, name))
	return string(b), err
}

// measure times do, with the page cache dropped or not.
func (m *mounted) measure(cold bool, do func(dir string) error) (cost, error) {
	if cold {
		if err := dropCaches(); err != nil {
			return cost{}, err
		}
	}
	before, err := m.cpu()
	if err != nil {
		return cost{}, err
	}
	wall, err := timed(func() error { return do(m.dir) })
	if err != nil {
		return cost{}, err
	}
	after, err := m.cpu()
	return cost{wall, after - before}, err
}
