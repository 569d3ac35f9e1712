package main

import (
	"log/slog"
	"reflect"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

func TestKeepOptions(t *testing.T) {
	for _, c := range []struct {
		keep keepOptions
		want blobcache.Options
	}{
		{keepOptions{}, blobcache.Options{}},
		{keepOptions{size: "unlimited", minFree: "0"}, blobcache.Options{MaxBytes: -1, MinFree: -1}},
		{keepOptions{size: "2GiB", minFree: "1T", paranoid: true}, blobcache.Options{MaxBytes: 2 << 30, MinFree: 1 << 40, Paranoid: true}},
	} {
		if got, err := c.keep.options(nil); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v: %+v, %v; want %+v", c.keep, got, err, c.want)
		}
	}
	for _, k := range []keepOptions{{size: "0"}, {size: "10%"}, {size: "none"}, {size: "-1"}, {minFree: "x"}, {minFree: "1.5G"}, {size: "9223372036854775807T"}} {
		if _, err := k.options(nil); exitCode(err) != exitUsage {
			t.Errorf("%+v: %v", k, err)
		}
	}
}

// A server that takes over a mount keeps as much as the one before.
func TestKeepIsRecorded(t *testing.T) {
	s := &sourceOptions{keep: keepOptions{size: "1GiB", minFree: "2GiB", paranoid: true}}
	a := s.access()
	if got := keptOptions(a); got != s.keep {
		t.Errorf("%+v, want %+v", got, s.keep)
	}
	if o, err := keptOptions(a).options(slog.Default()); err != nil || o.MaxBytes != 1<<30 || o.Logger == nil {
		t.Errorf("%+v, %v", o, err)
	}
}

// Another process is waited for no longer than the network would be, and what was waited counts for the network.
func TestPatienceWithOthers(t *testing.T) {
	for _, c := range []struct {
		wait    time.Duration
		offline bool
		want    time.Duration
	}{
		{time.Minute, false, 20 * time.Second}, {5 * time.Second, false, 5 * time.Second},
		{0, false, 0}, {registry.NoWait, false, 0}, {time.Minute, true, time.Millisecond},
	} {
		s := &sourceOptions{client: registry.Options{ErrorWait: c.wait}, offline: c.offline}
		if o, err := s.cacheOptions(slog.Default()); err != nil || o.Patience != c.want || o.Waiting == nil {
			t.Errorf("wait of %v: patience of %v, %v; want %v", c.wait, o.Patience, err, c.want)
		}
	}
}
