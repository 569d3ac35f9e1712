package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
)

// workerEnv marks the process that serves a supervised mount: it has the same
// arguments as its supervisor.
const workerEnv = "EROFS_OCI_WORKER"

func (p *program) isWorker() bool { return p.getenv(workerEnv) != "" }

// superviseMount has a child serve the mount, and another one whenever that dies
// and leaves the mount behind.
func (p *program) superviseMount(ctx context.Context, m *mountRequest, log *serverLog) error {
	signals := serverSignals()
	defer signal.Stop(signals)
	run, err := backend.OpenRunDir(p.getenv)
	if err != nil {
		return err
	}
	worker, err := backend.StartChild(ctx, os.Args[1:], m.source.stdin(), workerEnv+"=1")
	if err != nil {
		return err
	}
	s := &supervisor{run: run, dir: m.dir, password: m.source.client.Password, log: log.Logger, logFlags: log.options.flags()}
	if p.child != nil {
		if err := s.detach(p, log); err != nil {
			return errors.Join(err, worker.Process.Signal(syscall.SIGTERM), worker.Wait())
		}
	}
	return s.watch(ctx, worker, signals)
}

type supervisor struct {
	run      *backend.RunDir
	dir      string
	password string
	log      *slog.Logger
	logFlags []string // for another server, which has the environment of this process, too
}

// detach reports that the mount is there; the supervisor has a log of its own.
func (s *supervisor) detach(p *program, log *serverLog) error {
	file, err := backend.OpenLog(s.run.SupervisorLog(s.dir))
	if err != nil {
		return err
	}
	if err := p.child.Ready(file); err != nil {
		return err
	}
	p.reported = true
	log.redirect(file)
	return nil
}

// watch waits for one server after the other, until the mount has ended.
func (s *supervisor) watch(ctx context.Context, worker *exec.Cmd, signals <-chan os.Signal) error {
	for {
		err := workerEnded(waitForwarding(worker, signals))
		e, ok, findErr := s.run.Find(s.dir)
		if err != nil && ok && e.State == backend.Ended {
			err = fmt.Errorf("%s: %w", e.LastWords, err)
		}
		if findErr != nil || !ok || e.State != backend.Orphaned {
			return errors.Join(err, findErr)
		}
		s.log.Warn("the server died; starting another", "dir", s.dir, "pid", worker.Process.Pid, "err", err)
		if worker, err = s.replace(ctx); err != nil {
			return err
		}
	}
}

// workerEnded is err, with the exit code of a server whose bytes turned out to be wrong.
func workerEnded(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitWrong {
		return err
	}
	return &backend.ChildError{Text: "what was read turned out to be wrong, as the server has said", Code: exitWrong}
}

// waitForwarding waits for the worker and hands signals on to it.
func waitForwarding(worker *exec.Cmd, signals <-chan os.Signal) error {
	ended := make(chan error, 1)
	go func() { ended <- worker.Wait() }()
	for {
		select {
		case err := <-ended:
			return err
		case sig := <-signals:
			if err := worker.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return err
			}
		}
	}
}

// Pauses between tries to start another server, and how long they go on: readers
// fail by then.
const (
	restartPause    = 200 * time.Millisecond
	restartPauseMax = 10 * time.Second
	restartPatience = 10 * time.Minute
)

func (s *supervisor) replace(ctx context.Context) (*exec.Cmd, error) {
	begin := time.Now()
	for pause := restartPause; ; pause = min(2*pause, restartPauseMax) {
		args := append([]string{"reattach"}, s.logFlags...)
		source := &sourceOptions{}
		if s.password != "" {
			args, source.client.Password = append(args, "--password-stdin"), s.password
		}
		worker, err := backend.StartChild(ctx, append(args, s.dir), source.stdin())
		if err == nil {
			return worker, nil
		}
		s.log.Error("no server can be started for the mount; that is tried again, and readers wait", "dir", s.dir, "err", err)
		if time.Since(begin) > restartPatience {
			return nil, fmt.Errorf("no server could be started for %s within %v: %w", s.dir, restartPatience, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
