package nbdserve

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
	"github.com/erofs-oci/erofs-oci/tests/sourcetest"
)

// Where faulty sources begin to fail, and for how long.
const (
	badOffset = 2 << 20
	badSize   = 64 << 10
)

// faulty is a source of which every other 256 KiB is here, and one part cannot be
// had.
type faulty struct{ memory }

func (f faulty) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off < badOffset+badSize && off+int64(len(p)) > badOffset {
		return errors.New("cannot be had")
	}
	return f.memory.ReadAt(ctx, p, off)
}

func (f faulty) ReadResident(p []byte, off int64) bool {
	return off>>18&1 == 1 && (off+int64(len(p))-1)>>18 == off>>18 && f.memory.ReadResident(p, off)
}

func (f faulty) Present(off int64) (bool, int64) { return off>>18&1 == 1, (off>>18 + 1) << 18 }

// expose serves on a socket for programs, and returns its URI.
func expose(t *testing.T, e Export, o Options) (uri, socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	listen(t, e, o, l)
	return "nbd+unix:///?socket=" + socket, socket
}

func listen(t *testing.T, e Export, o Options, l net.Listener) {
	t.Helper()
	s, err := NewServer(e, o)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// try runs a program to its end and gives what it said.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = t.TempDir() // fio leaves files where it is
	cmd.Env = append(os.Environ(), require.SystemPath, "LC_ALL=C")
	said, err := cmd.CombinedOutput()
	return string(said), err
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	said, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, said)
	}
	return said
}

func wantIn(t *testing.T, said string, all ...string) {
	t.Helper()
	for _, want := range all {
		if !strings.Contains(said, want) {
			t.Errorf("no %q in\n%s", want, said)
		}
	}
}

func TestNbdinfo(t *testing.T) {
	require.Has(t, "nbdinfo")
	const size = 4<<20 - 100
	uri, _ := expose(t, Export{Name: "disk", Description: "sha256:abc", Source: faulty{make(memory, size)}}, Options{})
	wantIn(t, must(t, "nbdinfo", "--no-content", uri),
		"protocol: newstyle-fixed without TLS, using structured packets", "export-size: 4194304", "description: sha256:abc",
		"base:allocation", "x-erofs-oci:fetched", "is_read_only: true", "can_multi_conn: true", "can_flush: true", "can_df: true",
		"can_cache: true", "can_trim: false", "can_zero: false", "is_rotational: false",
		"block_size_minimum: 512", "block_size_preferred: 4096", "block_size_maximum: 33554432")
	wantIn(t, must(t, "nbdinfo", "--list", "--no-content", uri), `export="disk":`, "sha256:abc")
	if got := strings.TrimSpace(must(t, "nbdinfo", "--size", uri)); got != "4194304" {
		t.Errorf("size %s", got)
	}
	if got := strings.Fields(must(t, "nbdinfo", "--map", uri)); strings.Join(got, " ") != "0 4194304 0 data" {
		t.Errorf("map %q", got)
	}
	var want []string
	for off := 0; off < 4<<20; off += 512 << 10 {
		want = append(want, fmt.Sprintf("%d 262144 0", off), fmt.Sprintf("%d 262144 1", off+256<<10))
	}
	got := strings.Fields(must(t, "nbdinfo", "--map=x-erofs-oci:fetched", uri))
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("map of what is fetched: %q", got)
	}
	if said, err := try(t, "nbdinfo", strings.Replace(uri, "///", "///other", 1)); err == nil || !strings.Contains(said, "for export: other") {
		t.Errorf("another export: %v, %s", err, said)
	}
}

func TestNbdcopy(t *testing.T) {
	require.Has(t, "nbdcopy")
	content := sourcetest.Content(48<<20 + 123)
	for _, source := range []struct {
		name   string
		export Export
	}{
		{"here", Export{Source: memory(content)}},
		{"half here", Export{Source: halfHere{memory(content)}}},
		{"elsewhere", Export{Source: sourcetest.Memory(content)}},
	} {
		for _, connections := range []string{"1", "8"} {
			uri, _ := expose(t, source.export, Options{})
			out := filepath.Join(t.TempDir(), "out")
			must(t, "nbdcopy", "--connections="+connections, "--threads="+connections, uri, out)
			sameFile(t, source.name+", "+connections+" connections", out, content)
		}
	}
}

// sameFile wants a file with the content and the zeros that make it whole blocks.
func sameFile(t *testing.T, name, path string, content []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	padded := (len(content) + 511) / 512 * 512
	if len(got) != padded || !bytes.Equal(got[:len(content)], content) || bytes.ContainsFunc(got[len(content):], func(r rune) bool { return r != 0 }) {
		t.Errorf("%s: %d bytes that are not the %d of the source", name, len(got), len(content))
	}
}

func TestQemuImg(t *testing.T) {
	require.Has(t, "qemu-img")
	content := sourcetest.Content(16 << 20)
	file := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	uri, _ := expose(t, Export{Source: halfHere{memory(content)}}, Options{})
	wantIn(t, must(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", file, uri), "Images are identical.")
	out := filepath.Join(t.TempDir(), "out")
	must(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "-m", "8", "-W", uri, out)
	sameFile(t, "convert", out, content)
	wantIn(t, must(t, "qemu-img", "info", uri), "virtual size: 16 MiB")

	content[12345678]++
	other, _ := expose(t, Export{Source: memory(content)}, Options{})
	if said, err := try(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", file, other); err == nil || !strings.Contains(said, "mismatch") {
		t.Errorf("compare sees no difference: %v, %s", err, said)
	}
}

// TestQemuIO: reads, one that fails, and reads after it, on one connection.
func TestQemuIO(t *testing.T) {
	require.Has(t, "qemu-io")
	content := bytes.Repeat([]byte{0xab}, 4<<20)
	uri, _ := expose(t, Export{Source: faulty{content}}, Options{})
	said, err := try(t, "qemu-io", "-r", "-f", "raw", uri,
		"-c", "read -P 0xab 0 1M", "-c", "read 2M 4k", "-c", "read -P 0xab 1000 7", "-c", "read -P 0xab 3M 1M")
	if err == nil {
		t.Error("the exit code says nothing of the read that failed")
	}
	if n := strings.Count(said, "read failed: Input/output error"); n != 1 {
		t.Errorf("%d reads failed:\n%s", n, said)
	}
	wantIn(t, said, "read 1048576/1048576 bytes at offset 0", "read 7/7 bytes at offset 1000", "read 1048576/1048576 bytes at offset 3145728")
	if strings.Contains(said, "verification failed") {
		t.Error(said)
	}
}

// throughNbdkit runs a shell script in which $uri is that of an nbdkit whose nbd
// plugin is a client of the server at uri.
func throughNbdkit(t *testing.T, uri, script string) (string, error) {
	t.Helper()
	return try(t, "nbdkit", "--unix", "-", "nbd", uri, "--run", script)
}

// TestNbdkit: nbdkit's nbd plugin sends the requests of all its clients over one
// connection. It passes on what we say of ourselves, the bytes, and each error to
// whom it is for.
func TestNbdkit(t *testing.T) {
	require.Has(t, "nbdkit", "nbdinfo", "nbdcopy", "qemu-io")
	content := sourcetest.Content(16<<20 + 123)
	uri, _ := expose(t, Export{Name: "disk", Description: "sha256:abc", Source: halfHere{memory(content)}}, Options{})
	said, err := throughNbdkit(t, uri, `nbdinfo --no-content "$uri"`)
	if err != nil {
		t.Errorf("nbdinfo: %v", err)
	}
	wantIn(t, said, "export-size: 16777728", "description: sha256:abc", "is_read_only: true", "can_multi_conn: true",
		"can_flush: true", "can_cache: true", "block_size_minimum: 512", "block_size_preferred: 4096", "block_size_maximum: 33554432")
	out := filepath.Join(t.TempDir(), "out")
	if said, err := throughNbdkit(t, uri, `nbdcopy --connections=4 --threads=4 "$uri" `+out); err != nil {
		t.Errorf("nbdcopy: %v: %s", err, said)
	}
	sameFile(t, "nbdkit", out, content)

	uri, _ = expose(t, Export{Source: faulty{bytes.Repeat([]byte{0xab}, 4<<20)}}, Options{})
	said, err = throughNbdkit(t, uri, `qemu-io -r -f raw "$uri" -c 'read -P 0xab 0 1M' -c 'read 2M 4k' -c 'read -P 0xab 3M 1M'`)
	if err == nil {
		t.Errorf("the exit code says nothing of the read that failed: %s", said)
	}
	if n := strings.Count(said, "read failed: Input/output error"); n != 1 || strings.Contains(said, "verification failed") {
		t.Errorf("%d reads failed:\n%s", n, said)
	}
	wantIn(t, said, "read 1048576/1048576 bytes at offset 0", "read 1048576/1048576 bytes at offset 3145728")
}

// TestFio has fio verify checksums that fio itself put into the file.
func TestFio(t *testing.T) {
	require.Has(t, "fio")
	file := filepath.Join(t.TempDir(), "content")
	must(t, "fio", "--name=x", "--filename="+file, "--rw=write", "--bs=4k", "--size=16m", "--verify=crc32c", "--do_verify=0", "--randseed=7")
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(content []byte) (string, error) {
		uri, _ := expose(t, Export{Source: halfHere{memory(content)}}, Options{})
		return try(t, "fio", "--name=x", "--ioengine=nbd", "--uri="+uri, "--rw=randread", "--bs=4k", "--size=16m", "--iodepth=32",
			"--verify=crc32c", "--verify_fatal=1", "--randseed=7")
	}
	if said, err := verify(content); err != nil || !strings.Contains(said, "err= 0") {
		t.Errorf("%v\n%s", err, said)
	}
	content[8<<20+2000]++
	if said, err := verify(content); err == nil {
		t.Errorf("fio does not see a wrong byte:\n%s", said)
	}
}

// The scripts run one after another on one connection, which lives through all of
// them. Client-side checks are off: the server's are meant.
var nbdshScripts = []struct{ name, script string }{
	{"a read that fails, and the next", `
wants(errno.EIO, lambda: h.pread(512, bad))
same(h.pread(512, 0), 0)
wants(errno.EIO, lambda: h.pread(4096, bad - 512))
same(h.pread(512, bad - 512), bad - 512)`},
	{"a large read that fails", `
wants(errno.EIO, lambda: h.pread(2 << 20, 1 << 20))
same(h.pread(1 << 20, 0), 0)`},
	{"outside", `
wants(errno.EINVAL, lambda: h.pread(512, h.get_size()))
wants(errno.EINVAL, lambda: h.pread(512, h.get_size() - 511))
wants(errno.EINVAL, lambda: h.pread(512, 2**63 - 512))
wants(errno.EINVAL, lambda: h.cache(512, h.get_size()))`},
	{"too long", `
wants(errno.EINVAL, lambda: h.pread(33 << 20, 0))`},
	{"read-only", `
wants(errno.EPERM, lambda: h.pwrite(b'x' * 4096, 0))
wants(errno.EPERM, lambda: h.pwrite(b'x' * (1 << 20), 0))
wants(errno.EPERM, lambda: h.trim(512, 0))
wants(errno.EPERM, lambda: h.zero(512, 0))`},
	{"flags", `
wants(errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_FUA))
wants(errno.EINVAL, lambda: h.flush(nbd.CMD_FLAG_FUA))`},
	{"do not fragment", `
assert h.can_df() == structured
if structured:
    same(h.pread(512, 512, nbd.CMD_FLAG_DF), 512)
else:
    wants(errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_DF))`},
	{"flush and cache", `
h.flush()
h.cache(1 << 20, 0)
wants(errno.EIO, lambda: h.cache(1 << 20, bad))`},
	{"block status", `
seen = {}
def extents(context, offset, entries, error):
    seen[context] = entries
if structured:
    h.block_status(1 << 20, 0, extents)
    assert seen['base:allocation'] == [1 << 20, 0], seen
    assert seen['x-erofs-oci:fetched'] == [1 << 18, 0, 1 << 18, 1] * 2, seen
    h.block_status(1 << 20, 1 << 18, extents, nbd.CMD_FLAG_REQ_ONE)
    assert seen['x-erofs-oci:fetched'] == [1 << 18, 1], seen
    wants(errno.EINVAL, lambda: h.block_status(512, h.get_size(), extents))`},
	{"the last block", `
data = h.pread(512, h.get_size() - 512)
assert data[412:] == bytes(100), data
same(data[:412], h.get_size() - 512)`},
	{"many at a time, out of order", `
buffers = [nbd.Buffer(512) for _ in range(64)]
cookies = [h.aio_pread(b, i << 14) for i, b in enumerate(buffers)]
for c in cookies:
    while not h.aio_command_completed(c):
        h.poll(-1)
for i, b in enumerate(buffers):
    same(b.to_bytearray(), i << 14)`},
}

func TestNbdsh(t *testing.T) {
	require.Has(t, "nbdsh")
	content := sourcetest.Content(4<<20 - 100)
	file := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	_, socket := expose(t, Export{Source: faulty{memory(content)}}, Options{})
	for name, set := range map[string]string{
		"simple":     "h.set_request_structured_replies(False); structured = False",
		"structured": "h.add_meta_context('base:allocation'); h.add_meta_context('x-erofs-oci:fetched'); structured = True",
	} {
		t.Run(name, func(t *testing.T) {
			args := []string{"-c", fmt.Sprintf(`
import errno
bad = %d
content = open(%q, 'rb').read()
def same(data, offset):
    assert bytes(data) == content[offset:offset + len(data)], offset
def wants(number, f):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum == number, e
    else:
        raise AssertionError('no error')
%s
h.set_strict_mode(0)
h.connect_unix(%q)
`, badOffset, file, set, socket)}
			for _, s := range nbdshScripts {
				args = append(args, "-c", s.script+fmt.Sprintf("\nprint(%q)\n", "passed: "+s.name))
			}
			said := must(t, "nbdsh", args...)
			for _, s := range nbdshScripts {
				wantIn(t, said, "passed: "+s.name)
			}
		})
	}
}

// TestClientTLS: libnbd and we understand each other under TLS, and without it
// there is nothing.
func TestClientTLS(t *testing.T) {
	require.Has(t, "nbdcopy")
	cert, _ := certificate(t)
	content := sourcetest.Content(4 << 20)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen(t, Export{Source: halfHere{memory(content)}}, Options{TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}, l)
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	if err := os.WriteFile(filepath.Join(dir, "ca-cert.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	must(t, "nbdcopy", "nbds://"+l.Addr().String()+"/?tls-certificates="+dir, out)
	sameFile(t, "nbdcopy", out, content)
	if said, err := try(t, "nbdcopy", "nbd://"+l.Addr().String(), "null:"); err == nil {
		t.Errorf("served without TLS: %s", said)
	}
}
