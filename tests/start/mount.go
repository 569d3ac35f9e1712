package start

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"
)

// MountOptions say how to mount.
type MountOptions struct {
	Backend string
	Cache   string // the cache directory; made where there is none
	Flags   []string
}

// A Mounted is a mount of an image of a site.
type Mounted struct {
	Dir  string
	site *Site
}

// Mount mounts the image with that tag. Its page cache is empty.
func (s *Site) Mount(ctx context.Context, tag string, o MountOptions) (*Mounted, error) {
	dir, err := os.MkdirTemp(s.options.Dir, "mnt-")
	if err != nil {
		return nil, err
	}
	args := append([]string{"mount", "--backend=" + o.Backend, "--cache-dir=" + o.Cache}, o.Flags...)
	if err := s.Run(ctx, append(args, s.Ref(tag), dir)...); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	return &Mounted{Dir: dir, site: s}, nil
}

// Unmount ends the mount, and waits for its server to end.
func (m *Mounted) Unmount(ctx context.Context) error {
	return errors.Join(m.site.Run(ctx, "umount", m.Dir), os.Remove(m.Dir))
}

// listed is what list --json says of a mount.
type listed struct {
	Dir    string `json:"dir"`
	Status struct {
		Prefetch *prefetch `json:"prefetch"`
	} `json:"status"`
}

type prefetch struct {
	State string `json:"state"`
	Error string `json:"error"`
}

// Fetched returns when all is here that the mount fetches in the background.
func (m *Mounted) Fetched(ctx context.Context) error {
	// Nobody but the server knows, and it answers those who ask.
	ticks := time.NewTicker(50 * time.Millisecond)
	defer ticks.Stop()
	for {
		p, err := m.prefetch(ctx)
		switch {
		case err != nil:
			return err
		case p.State == "done":
			return nil
		case p.State == "stopped":
			return fmt.Errorf("the prefetch of %s has stopped: %s", m.Dir, p.Error)
		}
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return fmt.Errorf("the prefetch of %s is %s: %w", m.Dir, p.State, ctx.Err())
		}
	}
}

func (m *Mounted) prefetch(ctx context.Context) (prefetch, error) {
	text, err := m.site.Output(ctx, "list", "--json")
	if err != nil {
		return prefetch{}, err
	}
	var all []listed
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return prefetch{}, fmt.Errorf("list --json: %w", err)
	}
	for _, l := range all {
		if l.Dir == m.Dir && l.Status.Prefetch != nil {
			return *l.Status.Prefetch, nil
		}
	}
	return prefetch{}, fmt.Errorf("list --json: no mount on %s that fetches in the background: %s", m.Dir, text)
}
