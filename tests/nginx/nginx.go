// Package nginx runs a real nginx in front of something, for a test: what stands
// before most registries.
//
// It listens on a free port of 127.0.0.1 and ends with the test. A test that uses it
// is skipped where nginx is missing, unless it is demanded (see package require).
package nginx

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// Options of a server.
type Options struct {
	// Upstream is the host:port that requests are passed to, by plain HTTP.
	Upstream string
	// Certificate and Key are the server's, in PEM.
	Certificate, Key []byte
	// ClientCA, if there is one, is the authority (PEM) of whose certificates each
	// client has to show one.
	ClientCA []byte
}

const configuration = `
daemon off;
worker_processes 1;
%[5]spid %[1]s/pid;
error_log %[1]s/error.log info;
events { worker_connections 256; }
http {
	access_log off;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	server {
		listen %[2]s ssl http2;
		ssl_certificate %[1]s/server.crt;
		ssl_certificate_key %[1]s/server.key;
%[4]s		location / {
			proxy_pass http://%[3]s;
			proxy_set_header Host $http_host;
			proxy_set_header X-Forwarded-Proto https;
		}
	}
}
`

// Start returns the host:port where the server accepts connections, by TLS.
func Start(t testing.TB, o Options) string {
	t.Helper()
	require.Has(t, "nginx")
	dir := t.TempDir()
	write := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("server.crt", o.Certificate)
	write("server.key", o.Key)
	verify := ""
	if o.ClientCA != nil {
		write("client-ca.crt", o.ClientCA)
		verify = fmt.Sprintf("\t\tssl_client_certificate %s/client-ca.crt;\n\t\tssl_verify_client on;\n", dir)
	}
	// The socket is ours first, so that its port is known and connections wait for
	// nginx to come up; nginx takes sockets over as it does from the one before it
	// when it is upgraded.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	worker := ""
	if os.Geteuid() == 0 {
		worker = "user root;\n" // whom the directories of the test belong to
	}
	write("nginx.conf", fmt.Appendf(nil, configuration, dir, l.Addr(), o.Upstream, verify, worker))
	cmd := exec.Command("nginx", "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", filepath.Join(dir, "nginx.conf"))
	cmd.Env = append(os.Environ(), "NGINX=3;")
	cmd.ExtraFiles = []*os.File{socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM} // it ends its worker then
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatalf("nginx: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended by itself
		if err := cmd.Wait(); err != nil {
			t.Errorf("nginx: %v", err)
		}
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "error.log"))
			t.Logf("nginx: %s%s", said.String(), log)
		}
	})
	return l.Addr().String()
}
