package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// reportEnv tells the program started in the background the descriptor on which
// it reports to the one that started it.
const reportEnv = "EROFS_OCI_REPORT_FD"

// report is what the child says, once: that the mount is usable, or why not.
type report struct {
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"`
}

// ChildError is what a program in the background failed with. Its text is the
// child's, and Code the exit code that the child meant.
type ChildError struct {
	Text string
	Code int
}

func (e *ChildError) Error() string { return e.Text }

// StartInBackground runs this program with args, detached in a session of its own,
// and returns when it reports that it is ready or why it is not. A cancelled ctx
// ends the child before that. The child reads stdin (nil: nothing) through a pipe:
// a terminal would not answer another session.
func StartInBackground(ctx context.Context, args []string, stdin io.Reader) error {
	cmd, err := StartChild(ctx, args, stdin)
	if err != nil {
		return err
	}
	return cmd.Process.Release()
}

// StartChild is StartInBackground for those who want to wait for the child's end.
func StartChild(ctx context.Context, args []string, stdin io.Reader, env ...string) (*exec.Cmd, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(append(os.Environ(), env...), reportEnv+"=3")
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdin = stdin
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What our caller left open for us (a lock file, a pipe that somebody waits
	// for the end of) is not the server's to keep. Kernels before 5.11 cannot
	// do it at once; there the caller has to close what is its own.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	var rep report
	if err := json.NewDecoder(r).Decode(&rep); err != nil {
		return nil, diedEarly(cmd, err)
	}
	if rep.Error == "" {
		return cmd, nil
	}
	// Its exit code is in the report; what counts is that it is gone.
	_ = cmd.Wait()
	return nil, &ChildError{Text: rep.Error, Code: rep.Code}
}

// diedEarly makes an error of a child that ended without a report.
func diedEarly(cmd *exec.Cmd, err error) error {
	if !errors.Is(err, io.EOF) {
		err = fmt.Errorf("read its report: %w", err)
		cmd.Process.Kill()
	}
	if wait := cmd.Wait(); wait != nil {
		err = wait
	}
	return fmt.Errorf("the server ended before it was ready: %w", err)
}

// Child is the background's end of StartInBackground.
type Child struct {
	w    *os.File
	said atomic.Bool
}

// AsChild returns the Child that this process is, or nil for a process that
// nobody started in the background. orphaned is called if the parent ends before
// it heard from this process: then nobody wants the mount any more.
func AsChild(orphaned func()) (*Child, error) {
	v, ok := os.LookupEnv(reportEnv)
	if !ok {
		return nil, nil
	}
	fd, err := strconv.Atoi(v)
	if err != nil {
		return nil, fmt.Errorf("%s=%q: %w", reportEnv, v, err)
	}
	unix.CloseOnExec(fd)
	if err := os.Unsetenv(reportEnv); err != nil {
		return nil, err
	}
	watched, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("%s=%q: %w", reportEnv, v, err)
	}
	c := &Child{w: os.NewFile(uintptr(fd), "report")}
	go c.watch(watched, orphaned)
	return c, setName()
}

// watch waits for the parent to close its end of the pipe.
func (c *Child) watch(fd int, orphaned func()) {
	defer unix.Close(fd)
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, -1)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if !c.said.Load() {
		orphaned()
	}
}

// setName gives the process the name that it was called by: it was started as
// /proc/self/exe, and ps would show "exe".
func setName() error {
	return os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
}

// Ready tells the parent that the mount is usable, and lets go of the terminal:
// what is written to the standard files from now on, such as the runtime's last
// words, goes to log. The error is that nobody waits for the report any more.
func (c *Child) Ready(log *LogFile) error {
	if err := detach(log); err != nil {
		return err
	}
	return c.say(report{})
}

// Fail tells the parent why there is no mount, and the exit code that fits.
func (c *Child) Fail(err error, code int) error {
	return c.say(report{Error: err.Error(), Code: code})
}

func (c *Child) say(r report) error {
	c.said.Store(true)
	return errors.Join(json.NewEncoder(c.w).Encode(r), c.w.Close())
}

// detach gives up the working directory, which would keep a file system busy,
// and the terminal.
func detach(log *LogFile) error {
	if err := os.Chdir("/"); err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	if err := unix.Dup3(int(null.Fd()), 0, 0); err != nil {
		return fmt.Errorf("redirect standard input: %w", err)
	}
	return log.takeOutput()
}
