package registry_test

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
)

// A link that takes 0.5 MB/s, with next to no buffer of its own: what has been read of
// a body must soon have left, or the silence after the last byte is that of a buffer
// of the kernel's which is still being emptied.
func TestPutBlobSlowLink(t *testing.T) {
	t.Parallel()
	const size = 2 << 20
	small := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 8<<10) })
		if cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := small.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var puts, came atomic.Int64
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		switch q.Method {
		case http.MethodPost:
			w.Header().Set("Location", "/up")
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPut:
			puts.Add(1)
			buf := make([]byte, 25<<10)
			for {
				n, err := io.ReadFull(q.Body, buf)
				came.Add(int64(n))
				if err != nil {
					break
				}
				time.Sleep(50 * time.Millisecond) // that is how slow the link is
			}
			w.WriteHeader(http.StatusCreated)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	if err := s.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	s.Listener = l
	s.Start()
	defer s.Close()
	data := noise(size)
	c := openClient(t, registry.Options{NoProgress: time.Second})
	_, err = c.Repository(parse(t, l.Addr().String()+"/x:v1")).PutBlob(t.Context(), describe(data), bytes.NewReader(data), registry.PutOptions{})
	if err != nil || puts.Load() != 1 || came.Load() != size {
		t.Errorf("%v; %d PUTs, %d bytes came", err, puts.Load(), came.Load())
	}
}
