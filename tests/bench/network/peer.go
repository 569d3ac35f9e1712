package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// nbdkit is the name of the peer among the backends.
const nbdkit = "nbdkit"

// A peer does with standard parts what a mount does:
//
//	kernel erofs → loop → nbdfuse → nbdkit: readahead → cache → curl → HTTP
//
// The readahead filter of nbdkit 1.32 does nothing over the curl plugin, which takes
// one request at a time, and says so on standard error.
type peer struct {
	server, fuse   *exec.Cmd
	image, mounted string // where nbdfuse has the blob; where the image is mounted
}

// startPeer mounts the blob at url on dir; work is for its files.
func startPeer(url, work, dir string) (p *peer, err error) {
	socket := filepath.Join(work, "socket")
	p = &peer{image: filepath.Join(work, "image")}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.end())
		}
	}()
	if err := os.Mkdir(p.image, 0o700); err != nil {
		return p, err
	}
	p.server, err = p.start(filepath.Join(work, "nbdkit.pid"), "nbdkit", "--foreground", "--readonly", "--unix", socket,
		"--pidfile", filepath.Join(work, "nbdkit.pid"), "--filter=readahead", "--filter=cache", "curl", "url="+url, "cache-on-read=true")
	if err != nil {
		return p, err
	}
	p.fuse, err = p.start(filepath.Join(work, "nbdfuse.pid"), "nbdfuse", "--readonly", "--pidfile", filepath.Join(work, "nbdfuse.pid"),
		p.image, "nbd+unix:///?socket="+socket)
	if err != nil {
		return p, err
	}
	if err := command("mount", "-t", "erofs", "-o", "ro,loop", filepath.Join(p.image, "nbd"), dir); err != nil {
		return p, err
	}
	p.mounted = dir
	return p, nil
}

// start runs a program until it has written its pid, which says that it is ready.
func (p *peer) start(pidfile, name string, args ...string) (*exec.Cmd, error) {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(time.Millisecond) {
		if st, err := os.Stat(pidfile); err == nil && st.Size() > 0 {
			return cmd, nil
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return cmd, err
		}
	}
	return cmd, fmt.Errorf("%s is not ready after 10 s", name)
}

func (p *peer) end() error {
	var errs []error
	if p.mounted != "" {
		errs = append(errs, command("umount", p.mounted))
	}
	if p.fuse != nil {
		errs = append(errs, command("umount", p.image), p.fuse.Wait())
	}
	if p.server != nil {
		errs = append(errs, p.server.Process.Signal(os.Interrupt), p.server.Wait())
	}
	return errors.Join(errs...)
}

// download fetches the blob by one GET, once a connection is open: the rounds' median.
func (b *bench) download() (cost, error) {
	m := &mounted{bench: b}
	var rounds []cost
	for range b.rounds + 1 {
		c, err := m.measure(func() (int64, error) {
			resp, err := http.Get(b.blob)
			if err != nil {
				return 0, err
			}
			defer resp.Body.Close()
			return io.Copy(io.Discard, resp.Body)
		})
		if err != nil {
			return cost{}, err
		}
		rounds = append(rounds, c)
	}
	http.DefaultClient.CloseIdleConnections()
	return median(rounds[1:]), nil
}
