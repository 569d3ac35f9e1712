package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	be "encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// nbdServer is a running erofs-oci serve.
type nbdServer struct {
	t      *testing.T
	cmd    *exec.Cmd
	uri    string
	stderr bytes.Buffer
}

// serve starts a server and waits for its URI.
func (s *session) serve(args ...string) *nbdServer {
	s.t.Helper()
	v := &nbdServer{t: s.t, cmd: s.command(context.Background(), binary, append([]string{"serve"}, args...)...)}
	v.cmd.Stderr = &v.stderr
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := v.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if v.cmd.ProcessState == nil {
			v.cmd.Process.Kill()
			v.cmd.Wait()
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		v.cmd.Wait()
		s.t.Fatalf("serve %q says no URI: %s", args, v.stderr.String())
	}
	v.uri = strings.TrimSuffix(line, "\n")
	return v
}

// stop ends the server by a signal and wants success, and nothing said.
func (v *nbdServer) stop(sig os.Signal) {
	v.t.Helper()
	if err := v.cmd.Process.Signal(sig); err != nil {
		v.t.Fatal(err)
	}
	if err := v.cmd.Wait(); err != nil || v.stderr.Len() != 0 {
		v.t.Errorf("%v: %v, %q", sig, err, v.stderr.String())
	}
}

// layer is the digest and size of what serve serves.
func (s *session) layer(ref string) (digest string, size int64) {
	s.t.Helper()
	var seen struct {
		Blob struct {
			Digest string `json:"digest"`
			Size   int64  `json:"size"`
		} `json:"blob"`
	}
	if err := json.Unmarshal([]byte(s.must("inspect", "--json", ref)), &seen); err != nil {
		s.t.Fatal(err)
	}
	return seen.Blob.Digest, seen.Blob.Size
}

// copied wants nbdcopy to bring the layer, byte for byte.
func (s *session) copied(ref, uri string) {
	s.t.Helper()
	require.Has(s.t, "nbdcopy")
	digest, size := s.layer(ref)
	out := filepath.Join(s.dir, "copied")
	if r := s.run("nbdcopy", uri, out); r.code != 0 {
		s.t.Fatalf("nbdcopy %s: %s", uri, r.stderr)
	}
	f, err := os.Open(out)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyN(h, f, size); err != nil {
		s.t.Fatal(err)
	}
	if got := fmt.Sprintf("sha256:%x", h.Sum(nil)); got != digest {
		s.t.Errorf("copied %s, want %s", got, digest)
	}
	padding, err := io.ReadAll(f)
	if err != nil || int64(len(padding)) != (512-size%512)%512 || len(bytes.Trim(padding, "\x00")) > 0 {
		s.t.Errorf("%d bytes follow the layer's %d, %v", len(padding), size, err)
	}
}

// TestServe: a client gets the layer over TCP and over a socket, and no chunk of it
// is fetched twice; a signal ends the server, and nothing is left.
func TestServe(t *testing.T) {
	require.Has(t, "nbdcopy")
	im := serveImage(t)
	s := newSession(t)

	v := s.serve("--nbd", "127.0.0.1:0", im.ref)
	if !strings.HasPrefix(v.uri, "nbd://127.0.0.1:") {
		t.Fatalf("URI %q", v.uri)
	}
	_, size := s.layer(im.ref)
	im.ResetStats()
	s.copied(im.ref, v.uri)
	s.copied(im.ref, v.uri)
	if got := im.Stats().BlobBytes; got > size+size/100 {
		t.Errorf("%d bytes were fetched of a layer of %d", got, size)
	}
	v.stop(syscall.SIGTERM)

	socket := filepath.Join(s.dir, "a +socket")
	v = s.serve("--nbd", "unix:"+socket, im.ref)
	if want := "nbd+unix:///?socket=" + s.dir + "/a%20%2Bsocket"; v.uri != want {
		t.Errorf("URI %q, want %q", v.uri, want)
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}
	s.copied(im.ref, v.uri)
	wantLine(t, s.run(binary, "serve", "--nbd", "unix:"+socket, im.ref), "address already in use")
	// A server that was killed is in nobody's way.
	if err := v.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = v.cmd.Wait() // killed
	v = s.serve("--nbd", "unix:socket", im.ref)
	v.stop(os.Interrupt)
	v = s.serve("--nbd", "unix:"+socket, im.ref)
	s.copied(im.ref, v.uri)
	v.stop(os.Interrupt)
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	s.cacheIdle()
}

// TestServeNotInTheWay: what is not an abandoned socket is not removed for one.
func TestServeNotInTheWay(t *testing.T) {
	im := serveImage(t)
	s := newSession(t)
	file := filepath.Join(s.dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantLine(t, s.run(binary, "serve", "--nbd", "unix:"+file, im.ref), "address already in use")
	if got, err := os.ReadFile(file); err != nil || string(got) != "mine" {
		t.Errorf("the file is now %q, %v", got, err)
	}
	// The address may be left out: then it is the default one, which is taken.
	if l, err := net.Listen("tcp", "127.0.0.1:10809"); err == nil {
		defer l.Close()
	}
	for _, args := range [][]string{{"serve", "--nbd", im.ref}, {"serve", im.ref}, {"serve", "--nbd", "127.0.0.1", im.ref}} {
		wantLine(t, s.run(binary, args...), "127.0.0.1:10809", "address already in use")
	}
}

// TestServeTLS: who has no certificate gets nothing.
func TestServeTLS(t *testing.T) {
	require.Has(t, "nbdcopy")
	im := serveImage(t)
	s := newSession(t)
	certs := filepath.Join(s.dir, "certs")
	writeCertificate(t, certs)
	in := func(name string) string { return filepath.Join(certs, name) }
	v := s.serve("--nbd", "127.0.0.1:0", "--tls-cert", in("client-cert.pem"), "--tls-key", in("client-key.pem"), "--tls-client-ca", in("ca-cert.pem"), im.ref)
	if !strings.HasPrefix(v.uri, "nbds://127.0.0.1:") {
		t.Fatalf("URI %q", v.uri)
	}
	s.copied(im.ref, v.uri+"/?tls-certificates="+certs)
	empty := t.TempDir()
	ca, err := os.ReadFile(in("ca-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(empty, "ca-cert.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, uri := range []string{v.uri + "/?tls-certificates=" + empty, strings.Replace(v.uri, "nbds:", "nbd:", 1)} {
		if r := s.run("nbdcopy", uri, "null:"); r.code == 0 {
			t.Errorf("%s is served", uri)
		}
	}
	if err := v.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := v.cmd.Wait(); err != nil || !strings.Contains(v.stderr.String(), "client dropped") {
		t.Errorf("%v, %q", err, v.stderr.String())
	}
}

// writeCertificate puts a self-signed certificate into dir, by the names that
// libnbd looks for, as authority and as client.
func writeCertificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: cert},
		"client-cert.pem": {Type: "CERTIFICATE", Bytes: cert},
		"client-key.pem":  {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestServeRegistryDies: the client of a dead registry gets an error, never zeros,
// and goes on reading on the same connection when the registry is back.
func TestServeRegistryDies(t *testing.T) {
	t.Parallel()
	im := serveImage(t)
	s := newSession(t)
	v := s.serve("--nbd", "unix:socket", "--on-error=wait:1s", im.ref)
	conn, err := net.Dial("unix", filepath.Join(s.dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// The greeting; then the old way in: no flags, EXPORT_NAME of the default export.
	for _, step := range []struct {
		say  string
		hear int
	}{{"", 18}, {"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00", 10}} {
		if _, err := io.WriteString(conn, step.say); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(step.hear)); err != nil {
			t.Fatal(err)
		}
	}
	const far = bigSize / 2
	read := func(off uint64) (code uint32, data []byte) {
		t.Helper()
		q := be.BigEndian.AppendUint32(nil, 0x25609513)
		q = append(q, make([]byte, 4+8)...)
		q = be.BigEndian.AppendUint64(q, off)
		q = be.BigEndian.AppendUint32(q, 4096)
		if _, err := conn.Write(q); err != nil {
			t.Fatal(err)
		}
		head := make([]byte, 16)
		if _, err := io.ReadFull(conn, head); err != nil {
			t.Fatal(err)
		}
		if code = be.BigEndian.Uint32(head[4:]); code != 0 {
			return code, nil
		}
		data = make([]byte, 4096)
		if _, err := io.ReadFull(conn, data); err != nil {
			t.Fatal(err)
		}
		return 0, data
	}
	if code, _ := read(0); code != 0 {
		t.Fatalf("before: error %d", code)
	}
	im.Stop()
	if code, _ := read(far); code != 5 {
		t.Errorf("from a dead registry: error %d, want EIO", code)
	}
	if code, _ := read(4096); code != 0 {
		t.Errorf("what is here, while the registry is dead: error %d", code)
	}
	if err := im.Start(); err != nil {
		t.Fatal(err)
	}
	code, data := read(far)
	if code != 0 || bytes.Equal(data, make([]byte, 4096)) {
		t.Errorf("after: error %d, %.20x", code, data)
	}
	conn.Close()
	if err := v.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := v.cmd.Wait(); err != nil || !strings.Contains(v.stderr.String(), "request failed") || !strings.Contains(v.stderr.String(), "refused") {
		t.Errorf("%v, the log does not say why: %q", err, v.stderr.String())
	}
}
