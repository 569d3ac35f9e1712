package nbdserve

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func TestDeviceOptions(t *testing.T) {
	for _, c := range []struct {
		in  DeviceOptions
		err string
	}{
		{in: DeviceOptions{Size: 512}},
		{in: DeviceOptions{Size: 1 << 40, BlockSize: 4096, Connections: 64, Timeout: 1, DeadConnTimeout: 1}},
		{in: DeviceOptions{}, err: "0 bytes are not one or more blocks"},
		{in: DeviceOptions{Size: -512}, err: "-512 bytes"},
		{in: DeviceOptions{Size: math.MaxInt64}, err: "blocks of 512"},
		{in: DeviceOptions{Size: 513}, err: "513 bytes"},
		{in: DeviceOptions{Size: 512, BlockSize: 1024}, err: "blocks of 1024"},
		{in: DeviceOptions{Size: 768, BlockSize: 768}, err: "powers of two"},
		{in: DeviceOptions{Size: 1 << 30, BlockSize: 1 << 20}, err: "powers of two"},
		{in: DeviceOptions{Size: 512, BlockSize: -512}, err: "powers of two"},
		{in: DeviceOptions{Size: 512, Connections: 65}, err: "65 connections"},
		{in: DeviceOptions{Size: 512, Connections: -1}, err: "-1 connections"},
		{in: DeviceOptions{Size: 512, Timeout: -1}, err: "negative"},
		{in: DeviceOptions{Size: 512, DeadConnTimeout: -1}, err: "negative"},
	} {
		_, err := c.in.withDefaults()
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%+v: %v, want %q", c.in, err, c.err)
		}
	}
}

// The kernel is never asked to wait for ever, and counts in seconds.
func TestDeviceTimeouts(t *testing.T) {
	for _, c := range []struct{ in, dead, want, wantDead time.Duration }{
		{0, 0, 90 * time.Second, 390 * time.Second},
		{time.Nanosecond, time.Nanosecond, time.Second, time.Second},
		{time.Second, 1001 * time.Millisecond, time.Second, 2 * time.Second},
		{2 * time.Second, 0, 2 * time.Second, 302 * time.Second},
	} {
		o, err := DeviceOptions{Size: 512, Timeout: c.in, DeadConnTimeout: c.dead}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		if a := o.attachment(7); a.Timeout != c.want || a.DeadConnTimeout != c.wantDead || a.Path() != "/dev/nbd7" {
			t.Errorf("%v, %v: %+v", c.in, c.dead, a)
		}
	}
	a, _ := DeviceOptions{Size: 512}.withDefaults()
	b, _ := DeviceOptions{Size: 512}.withDefaults()
	if a.Identifier == b.Identifier || !strings.HasPrefix(a.Identifier, identifierPrefix) || len(a.Identifier) < 30 {
		t.Errorf("identifiers %q and %q", a.Identifier, b.Identifier)
	}
}

// The nesting of the sockets, byte by byte, on a little-endian machine:
// SOCKETS { SOCK_ITEM { SOCK_FD u32 }, … }, and 0x8000 marks what is nested.
func TestEncodeSockets(t *testing.T) {
	e := netlink.NewAttributeEncoder()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	encodeSockets(e, []*os.File{f, f})
	got, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	item := []byte{12, 0, 1, 0x80, 8, 0, 1, 0, byte(f.Fd()), 0, 0, 0}
	want := slices.Concat([]byte{28, 0, 7, 0x80}, item, item)
	if !slices.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

func TestIndexOf(t *testing.T) {
	for _, c := range []struct {
		data  []byte
		index int
		ok    bool
	}{
		{[]byte{8, 0, 1, 0, 3, 0, 0, 0}, 3, true},
		{[]byte{8, 0, 2, 0, 3, 0, 0, 0}, 0, false},
		{[]byte{6, 0, 1, 0, 3, 0, 0, 0}, 0, false},
		{[]byte{9, 0}, 0, false},
		{nil, 0, false},
	} {
		if index, ok := indexOf(genetlink.Message{Data: c.data}); ok != c.ok || ok && index != c.index {
			t.Errorf("%x: %d, %v", c.data, index, ok)
		}
	}
}

func TestReadState(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("nbd0/size", "0\n")
	write("nbd2/size", "8\n")
	write("nbd2/pid", "77\n")
	write("nbd2/dev", "43:32\n")
	write("nbd10/size", "9\n")
	write("nbd10/pid", "78\n")
	write("nbd10/backend", "erofs-oci-X\n")
	write("nbdX/size", "1\n")
	write("loop0/size", "1\n")
	got, err := readStates(root)
	if err != nil {
		t.Fatal(err)
	}
	want := []State{
		{Index: 0},
		{Index: 2, Connected: true, PID: 77, Size: 4096, Number: "43:32"},
		{Index: 10, Connected: true, PID: 78, Size: 4608, Identifier: "erofs-oci-X"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if _, err := readState(root, 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no device: %v", err)
	}
	write("nbd3/size", "many\n")
	if _, err := readState(root, 3); err == nil || !strings.Contains(err.Error(), "its size") {
		t.Errorf("a size that is none: %v", err)
	}
}

// TestStrays: a device of this program without a record and without its process is
// shown; it is in nobody's way.
func TestStrays(t *testing.T) {
	root := t.TempDir()
	device := func(index int, pid, backend string) {
		t.Helper()
		dir := filepath.Join(root, fmt.Sprintf("nbd%d", index))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"size": "8", "dev": fmt.Sprintf("43:%d", index<<5), "pid": pid, "backend": backend} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	device(0, "10", "erofs-oci-RECORDED")
	device(1, "10", "erofs-oci-STRAY")
	device(2, "11", "erofs-oci-STARTING") // its process lives
	device(3, "10", "of somebody else")
	device(4, "10", "")
	device(5, "", "")
	device(6, "12", "erofs-oci-STRAY2")
	device(7, "", "")
	living := func(pid int) bool { return pid == 11 }
	got, err := readStrays(root, []string{"erofs-oci-RECORDED", "erofs-oci-GONE"}, living)
	want := []State{
		{Index: 1, Connected: true, PID: 10, Identifier: "erofs-oci-STRAY", Size: 4096, Number: "43:32"},
		{Index: 6, Connected: true, PID: 12, Identifier: "erofs-oci-STRAY2", Size: 4096, Number: "43:192"},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
	all, err := readStates(root)
	if numbers := free(all); err != nil || !slices.Equal(numbers, []int{5, 7}) {
		t.Errorf("free are %v, %v", numbers, err)
	}
	if got, err := readStrays(filepath.Join(root, "no"), nil, living); err != nil || len(got) != 0 {
		t.Errorf("without sysfs: %+v, %v", got, err)
	}
}

func TestExists(t *testing.T) {
	if !exists(os.Getpid()) || !exists(unix.Gettid()) || !exists(1) {
		t.Error("a living process is taken for dead")
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	if exists(dead.Process.Pid) {
		t.Error("a dead process is taken for living")
	}
}

func TestUevent(t *testing.T) {
	event := []byte("change@/devices/virtual/block/nbd1\x00ACTION=change\x00DEVNAME=nbd1\x00DEVTYPE=disk\x00")
	if !about(event, "nbd1") || about(event, "nbd11") || about(event, "nbd") || about(nil, "nbd1") {
		t.Errorf("%q is taken for another's", event)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	u, err := listenUevents()
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if err := u.wait(ctx, "no such device"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestHungUp(t *testing.T) {
	ours, theirs, err := socketPairs(3)
	if err != nil {
		t.Fatal(err)
	}
	defer closeConns(ours)
	defer closeFiles(theirs)
	theirs[1].Close()
	for i, want := range []bool{false, true, false} {
		if got := hungUp(ours[i]); got != want {
			t.Errorf("pair %d: %v", i, got)
		}
	}
}

// A connection that ends with the request to disconnect is told from one that is
// only closed.
func TestFarewell(t *testing.T) {
	server, err := NewServer(Export{Source: zeros(4096)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	disconnectRequest := make([]byte, 28)
	copy(disconnectRequest, []byte{0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2})
	for _, c := range []struct {
		send []byte
		left bool
	}{{disconnectRequest, false}, {nil, true}, {disconnectRequest[:5], true}} {
		ours, theirs, err := socketPairs(1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := theirs[0].Write(c.send); err != nil {
			t.Fatal(err)
		}
		theirs[0].Close()
		conn := &farewellConn{Conn: ours[0]}
		err = server.Transmit(t.Context(), conn)
		if conn.left.Load() != c.left {
			t.Errorf("after %x: left %v, %v", c.send, conn.left.Load(), err)
		}
		if !c.left && err != nil {
			t.Errorf("after %x: %v", c.send, err)
		}
	}
}

type zeros int64

func (z zeros) Size() int64 { return int64(z) }
func (z zeros) ReadAt(_ context.Context, p []byte, _ int64) error {
	clear(p)
	return nil
}
