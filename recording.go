package main

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/registry/profile"
)

func recordFlag() cli.Flag {
	return &cli.StringFlag{Name: "record", Usage: "write to `FILE` what is read of the layers, and in which order: a profile"}
}

// recordOption is the file of --record. That it cannot be written is found out before anything else is done.
func recordOption(c *cli.Context) (string, error) {
	if !c.IsSet("record") {
		return "", nil
	}
	if c.String("record") == "" {
		return "", usagef("--record needs the name of a file")
	}
	file, err := absolute(c.String("record"))
	if err != nil {
		return "", err
	}
	if err := profile.CheckFile(file); err != nil {
		return "", fmt.Errorf("--record: %w", err)
	}
	return file, nil
}

// recordFrom is what a recording begins with: what its file has, if that is what is fetched in the background, too. Who
// has both in one file wants to know more than before, and is not to lose it. Nil is nothing.
func (s *sourceOptions) recordFrom() *profile.Profile {
	if s.prefetch.profile == nil {
		return nil
	}
	fetched, err := os.Stat(s.prefetch.mode)
	if err != nil {
		return nil
	}
	recorded, err := os.Stat(s.record)
	if err != nil || !os.SameFile(fetched, recorded) {
		return nil
	}
	return s.prefetch.profile
}

// recordPause is how long what was read for the first time waits for more before the file is written: so much a server
// that is killed takes with it.
const recordPause = 3 * time.Second

// A recording notes what is read of the layers of a mount, and keeps a file up to date with it. Nil, it does neither.
type recording struct {
	file     string
	recorder *profile.Recorder
	log      *slog.Logger
	pause    time.Duration
	saved    func(error) // nil, or told of each writing while the mount goes on

	begun bool
	stop  chan struct{}
	done  sync.WaitGroup
}

// newRecording has reads of the layers be noted from now on, after those of from; nil has none.
func newRecording(file string, from *profile.Profile, layers []openedLayer, log *slog.Logger) (*recording, error) {
	r := &recording{file: file, log: log, pause: recordPause, stop: make(chan struct{})}
	return r, r.attach(profile.NewRecorder(from), layers)
}

// resumeRecording is newRecording for a server that takes the place of another one: what that recorded comes first. A
// file that is not what it should be is begun anew, since a mount does not depend on it.
func resumeRecording(file string, layers []openedLayer, log *slog.Logger) (*recording, error) {
	from, err := profile.ReadFile(file)
	if err == nil {
		var r *recording
		if r, err = newRecording(file, from, layers, log); err == nil {
			return r, nil
		}
	}
	log.Warn("the recorded profile is begun anew", "file", file, "err", err)
	return newRecording(file, nil, layers, log)
}

// attach has the layers tell the recorder what is read of them; all of them or, with an error, none. A layer that was
// decompressed as a whole is left out: it cannot be fetched in parts.
func (r *recording) attach(recorder *profile.Recorder, layers []openedLayer) error {
	touches := make([]*profile.Touches, len(layers))
	for i := range layers {
		l := &layers[i]
		if l.blob.cached == nil {
			r.log.Warn("reads of a layer are not recorded: it is fetched as a whole", "file", r.file, "blob", l.Digest)
			continue
		}
		var err error
		if touches[i], err = recorder.Blob(l.Digest.String(), l.profileSize(), l.blob.cached.Unit()); err != nil {
			return err
		}
	}
	r.recorder = recorder
	for i := range layers {
		layers[i].blob.touches = touches[i]
	}
	return nil
}

// profileSize is the size that a profile has of a layer which the cache keeps: that of the blob, whatever it is verified
// by and how much of it may be read, or that of the image which is compressed in it.
func (l *openedLayer) profileSize() int64 {
	if l.blob.image != nil {
		return l.blob.cached.Size()
	}
	return l.Size
}

// begin writes the file for the first time, and goes on with it until Close.
func (r *recording) begin() error {
	if r == nil {
		return nil
	}
	if err := r.save(); err != nil {
		return fmt.Errorf("--record: %w", err)
	}
	r.start()
	return nil
}

// start goes on with the file until Close.
func (r *recording) start() {
	if r == nil {
		return
	}
	r.begun = true
	r.done.Go(r.follow)
}

func (r *recording) save() error {
	p, err := r.recorder.Profile()
	if err != nil {
		return err
	}
	return profile.WriteFile(r.file, p)
}

// follow writes the file whenever something new was read, but not at once.
func (r *recording) follow() {
	failing := false
	for {
		select {
		case <-r.recorder.Changed():
		case <-r.stop:
			return
		}
		select {
		case <-time.After(r.pause):
		case <-r.stop:
			return
		}
		err := r.save()
		if err != nil && !failing {
			r.log.Error("what is read is recorded, and cannot be written; that is tried again", "file", r.file, "err", err)
		}
		failing = err != nil
		if r.saved != nil {
			r.saved(err)
		}
	}
}

// Close writes the file for the last time, if it was begun.
func (r *recording) Close() error {
	if r == nil || !r.begun {
		return nil
	}
	close(r.stop)
	r.done.Wait()
	if err := r.save(); err != nil {
		return fmt.Errorf("--record: what was read last is missing in the profile: %w", err)
	}
	return nil
}
