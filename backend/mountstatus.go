package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// MountStatus is what the server of a mount knows of it now, beside what is recorded.
type MountStatus struct {
	Layers   []LayerStatus   `json:"layers"`
	Prefetch *PrefetchStatus `json:"prefetch,omitempty"` // nil: nothing was to be fetched in the background
	// Metrics are what the server counts, in the text format of Prometheus. "" where nobody asked for them.
	Metrics string `json:"metrics,omitempty"`
}

// PrefetchStatus is how far the fetching in the background is.
type PrefetchStatus struct {
	Mode    string        `json:"mode"` // as --prefetch has it
	State   PrefetchState `json:"state"`
	Wanted  int64         `json:"wanted"`          // bytes, as far as that is known
	Fetched int64         `json:"fetched"`         // those of them that are here
	Error   string        `json:"error,omitempty"` // why it waits, or was stopped
}

// PrefetchState says what the fetching in the background does.
type PrefetchState string

const (
	PrefetchRunning PrefetchState = "running"
	PrefetchWaiting PrefetchState = "waiting" // something went wrong, and is tried again later
	PrefetchDone    PrefetchState = "done"
	PrefetchStopped PrefetchState = "stopped" // there is more, and it will not be fetched
)

// LayerStatus is that of one layer's image.
type LayerStatus struct {
	Digest   string `json:"digest"`      // of the blob
	By       string `json:"verified_by"` // what its bytes are verified by; "none" if by nothing
	Size     int64  `json:"size"`        // of what can be read of it
	Fetched  int64  `json:"fetched"`     // bytes that are here
	Verified int64  `json:"verified"`    // those of them that were verified
	Wrong    string `json:"wrong,omitempty"`
}

// A StatusServer answers those who ask for the status of a mount, until Close.
//
// It is a socket in the run directory, ID.sock: whoever connects is sent the status, once it
// has said what else it wants: wantsMetrics, or nothing. A file that the server writes now and
// then would be out of date as often as not, and would be written for nobody most of the time.
// That the socket refuses says that the server is gone.
type StatusServer struct {
	listener net.Listener
	done     sync.WaitGroup
}

const (
	// statusClients are answered at a time: who does not listen is not in the way of who does.
	statusClients = 32
	// statusPatience is for one of them. Who asks has more, so that it comes to its turn.
	statusPatience = 2 * time.Second
	askerPatience  = 3 * time.Second
	// statusQuestion is how long a client has to say what it wants: one that says nothing until then is answered, and
	// makes room.
	statusQuestion = 250 * time.Millisecond
	// wantsMetrics is the question that has the metrics in the answer, too.
	wantsMetrics = 'm'
)

// ErrNoAnswer is the error of a server that is there and does not answer: it was stopped, say.
var ErrNoAnswer = errors.New("its server does not answer")

// ServeStatus begins to answer with what status returns, several at a time. To gather metrics costs something: they are
// wanted only where somebody asked for them.
func (c *Claim) ServeStatus(status func(metrics bool) MountStatus) (*StatusServer, error) {
	path := c.run.file(c.id, ".sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	s := &StatusServer{}
	err := c.run.bySocketPath(c.id, func(short string) (err error) {
		// The directory is open to its owner only.
		s.listener, err = net.Listen("unix", short)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("status of the mount: %w", err)
	}
	// Its name is short while the directory is open; remove takes the file away.
	s.listener.(*net.UnixListener).SetUnlinkOnClose(false)
	s.done.Go(func() { s.serve(status) })
	return s, nil
}

// bySocketPath calls f with a path of the socket that fits into an address: there is room
// for 107 bytes, and the run directory may have a longer path.
func (r *RunDir) bySocketPath(id string, f func(short string) error) error {
	dir, err := os.Open(r.path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return f(filepath.Join("/proc/self/fd", fmt.Sprint(dir.Fd()), id+".sock"))
}

func (s *StatusServer) serve(status func(metrics bool) MountStatus) {
	slots := make(chan struct{}, statusClients)
	for {
		conn, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Descriptors have run out, say; it is not for this to end.
			time.Sleep(100 * time.Millisecond)
			continue
		}
		slots <- struct{}{}
		s.done.Go(func() {
			defer func() { <-slots }()
			answerStatus(conn, status)
		})
	}
}

// answerStatus answers one who asks. That it does not listen is its own affair.
func answerStatus(conn net.Conn, status func(metrics bool) MountStatus) {
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(statusQuestion))
	var question [1]byte
	n, _ := conn.Read(question[:])
	_ = conn.SetWriteDeadline(time.Now().Add(statusPatience))
	_ = json.NewEncoder(conn).Encode(status(n == 1 && question[0] == wantsMetrics))
}

// Close ends the answering.
func (s *StatusServer) Close() error {
	err := s.listener.Close()
	s.done.Wait()
	return err
}

// Status asks the server of the mount on dir, which is as in a Record. It says false where
// there is none to ask.
func (r *RunDir) Status(ctx context.Context, dir string) (status MountStatus, ok bool, err error) {
	return r.askServer(ctx, dir, nil)
}

// StatusAndMetrics is Status with the Metrics.
func (r *RunDir) StatusAndMetrics(ctx context.Context, dir string) (status MountStatus, ok bool, err error) {
	return r.askServer(ctx, dir, []byte{wantsMetrics})
}

func (r *RunDir) askServer(ctx context.Context, dir string, question []byte) (status MountStatus, ok bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askerPatience)
	defer cancel()
	err = r.bySocketPath(id(dir), func(short string) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", short)
		if err != nil {
			return nil // it is gone
		}
		defer conn.Close()
		err = converse(ctx, conn.(*net.UnixConn), question, &status)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = ErrNoAnswer
		}
		if err != nil {
			return fmt.Errorf("status of the mount on %s: %w", dir, err)
		}
		ok = true
		return nil
	})
	return status, ok, err
}

// converse asks and reads the answer.
func converse(ctx context.Context, conn *net.UnixConn, question []byte, status *MountStatus) error {
	if deadline, has := ctx.Deadline(); has {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if _, err := conn.Write(question); err != nil {
		return err
	}
	if err := conn.CloseWrite(); err != nil { // that was all
		return err
	}
	return json.NewDecoder(conn).Decode(status)
}
