// Package backend is what every way of mounting an image has in common: the
// interfaces that join a source of bytes to a mount, the options of mount(8),
// the record of running mounts, and the start of a server in the background.
//
// It does not read images, speak to a registry or serve a request.
//
// A running mount is known to the other commands by files in the run directory
// ($EROFS_OCI_RUN_DIR, else /run/erofs-oci for root, else
// $XDG_RUNTIME_DIR/erofs-oci, else a private directory below the temporary one):
//
//	ID.lock   locked for as long as the server lives (an open file description
//	          lock, so the kernel lets go of it however the server ends)
//	ID.json   the Record; it holds no secret
//	ID.sock   the server, to be asked for the MountStatus
//	ID.log    what the server had to say; kept when the server died
//
// ID derives from the mount's directory, so that a directory has one mount of
// ours at most.
package backend

import (
	"context"
	"fmt"
	"log/slog"
	"syscall"
)

// Source is a blob that can be read at random.
type Source interface {
	// ReadAt fills all of p from off, or returns a non-nil error; there is no
	// short read. Calls may run in parallel. p is not kept after the call.
	ReadAt(ctx context.Context, p []byte, off int64) error
	Size() int64
}

// Volume is what is mounted: an image, and the extra devices of its device table;
// and the volumes that it is laid over, if it is the topmost of several.
type Volume struct {
	Primary Source
	Devices []Source
	// Below are the lower layers, the lowest last; each has none itself.
	Below []Volume
	// Name is what errors call one of several layers; "layer N", counted from the
	// lowest, if empty.
	Name string
}

// Layers are the volume and those below it, each by itself, the topmost first.
func (v Volume) Layers() []Volume {
	below := v.Below
	v.Below = nil
	return append([]Volume{v}, below...)
}

// OneLayer is an error where a volume has others below it.
func (v Volume) OneLayer() error {
	if len(v.Below) == 0 {
		return nil
	}
	return fmt.Errorf("this way of mounting takes one layer, and there are %d", 1+len(v.Below))
}

// Options are what a user may say of a mount. The zero value mounts read-only
// with the defaults of mount(8).
type Options struct {
	// Name is what df(1) and /proc/mounts show as the source.
	Name  string
	Flags MountOptions
	// Log receives the reason of each error that a reader sees as an errno.
	// Nil discards.
	Log *slog.Logger
	// Failed is told of each of these errors, those included that are not logged because there are too many. It is called
	// by several at a time. Nil: nobody wants to know.
	Failed func(syscall.Errno)
}

// Backend mounts volumes in one particular way.
type Backend interface {
	// Mount returns when target is usable. ctx bounds the mounting only.
	Mount(ctx context.Context, v Volume, target string, o Options) (Mount, error)
}

// Mount is one mounted volume.
type Mount interface {
	// Wait returns when the mount has ended, whoever ended it.
	Wait() error
	// Unmount takes the mount away from its directory. A mount in use is
	// detached: it ends with its last user, and no new one can come.
	Unmount() error
	// Device tells the mount from others on the same directory.
	Device() Device
}
