package corpus

import (
	"testing"
)

func TestImages(t *testing.T) {
	images := Images(t)
	if len(images) != 44 {
		t.Fatalf("%d images, want 44", len(images))
	}
	for _, im := range images {
		if len(im.Data) < 4096 || im.Flags == "" {
			t.Errorf("%s: %d bytes, flags %q", im.Name, len(im.Data), im.Flags)
		}
		if (im.Blob != nil) != (im.Name == "multidev") {
			t.Errorf("%s: blob of %d bytes", im.Name, len(im.Blob))
		}
		list := im.Listing(t)
		if len(list) != 271 || list[0].Path != "." || list[0].Mode>>12 != 4 {
			t.Errorf("%s: %d entries, the first is %+v", im.Name, len(list), list[0])
		}
	}
}

func TestParseEntry(t *testing.T) {
	e, err := parseEntry([]byte(`{"path": "raw-\udcff\\udcfe\ud83d\udc90é", "mode": "0o60600", "uid": 1, "gid": 2, "nlink": 3,` +
		` "ino": 4, "mtime_ns": -5, "rdev": [259, 70000], "xattrs": {"user.a": "00ff"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := "raw-\xff\\udcfe\U0001f490é"; e.Path != want {
		t.Errorf("path %q, want %q", e.Path, want)
	}
	if e.Mode != 0o60600 || e.MtimeNs != -5 || *e.Rdev != [2]uint32{259, 70000} || string(e.Xattrs["user.a"]) != "\x00\xff" {
		t.Errorf("%+v", e)
	}
	if _, err := parseEntry([]byte(`{"path": "x", "mode": "0o644", "colour": 1}`)); err == nil {
		t.Error("an unknown field was accepted")
	}
}
