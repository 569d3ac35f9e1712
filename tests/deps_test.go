package tests

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/erofs-oci/erofs-oci"

// A room is a package and what its non-test files may import directly: packages
// of ours (without the module's path), and modules of others. The standard
// library is free to all but for what deny names.
type room struct {
	ours   []string
	others []string
	deny   []string
}

// lattice is the shape of the program: who may know whom.
var lattice = map[string]room{
	"erofsfmt/internal/ondisk": {},
	"erofsfmt": {
		ours:   []string{"erofsfmt/internal/ondisk"},
		others: []string{"github.com/pierrec/lz4/v4", "github.com/klauspost/compress"},
		deny:   []string{"net", "os", "log"},
	},
	"erofsfmt/mkerofs": {
		ours:   []string{"erofsfmt/internal/ondisk"},
		others: []string{"github.com/klauspost/compress"},
	},
	"registry/integrity": {},
	"registry/blobcache": {others: []string{"github.com/opencontainers/go-digest", "golang.org/x/sync", "golang.org/x/sys"}},
	"registry/chunked": {
		ours:   []string{"registry/integrity"},
		others: []string{"github.com/klauspost/compress"},
	},
	"registry/verified": {
		ours:   []string{"registry/integrity"},
		others: []string{"github.com/opencontainers/go-digest"},
	},
	"registry/profile":   {others: []string{"github.com/opencontainers/go-digest"}},
	"registry/lastknown": {deny: []string{"net", "log"}},
	"registry/tarlayer": {
		others: []string{"github.com/klauspost/compress", "github.com/ulikunitz/xz", "github.com/opencontainers/go-digest",
			"github.com/opencontainers/image-spec"},
	},
	"registry": {
		ours: []string{"registry/integrity"},
		others: []string{"go.podman.io/image/v5", "github.com/opencontainers/go-digest", "github.com/opencontainers/image-spec",
			"golang.org/x/sync", "github.com/docker/docker-credential-helpers"},
	},
	"backend":           {others: []string{"golang.org/x/sys", "github.com/moby/sys/mountinfo"}},
	"backend/serverlog": {},
	"backend/kmount":    {others: []string{"golang.org/x/sys"}},
	"fusefs": {
		ours:   []string{"backend", "backend/kmount", "erofsfmt"},
		others: []string{"github.com/hanwen/go-fuse/v2", "golang.org/x/sys"},
	},
	"nbdserve": {
		ours:   []string{"backend", "backend/kmount"},
		others: []string{"golang.org/x/sys", "github.com/mdlayher/genetlink", "github.com/mdlayher/netlink", "github.com/pojntfx/go-nbd"},
	},
}

type listed struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Module     *struct{ Path string }
}

func goList(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Standard,Imports,Module"}, args...)...)
	cmd.Dir = ".."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var all []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// TestImports keeps each package in its place.
func TestImports(t *testing.T) {
	moduleOf := make(map[string]string)
	standard := make(map[string]bool)
	for _, p := range goList(t, "-deps", "./...") {
		standard[p.ImportPath] = p.Standard
		if p.Module != nil {
			moduleOf[p.ImportPath] = p.Module.Path
		}
	}
	seen := 0
	for _, p := range goList(t, "./...") {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if name == "" || name == "tests" || strings.HasPrefix(name, "tests/") {
			continue // main and the tests join the parts
		}
		r, ok := lattice[name]
		if !ok {
			t.Errorf("package %s has no place in the lattice", name)
			continue
		}
		seen++
		for _, imp := range p.Imports {
			if why := r.refuses(imp, standard[imp], moduleOf[imp]); why != "" {
				t.Errorf("%s imports %s: %s", name, imp, why)
			}
		}
	}
	if seen != len(lattice) {
		t.Errorf("%d packages were looked at, and the lattice has %d", seen, len(lattice))
	}
}

func (r room) refuses(imp string, standard bool, mod string) string {
	if standard {
		for _, d := range r.deny {
			if imp == d || strings.HasPrefix(imp, d+"/") {
				return "this package must not know it"
			}
		}
		return ""
	}
	if mod == module {
		if slices.Contains(r.ours, strings.TrimPrefix(imp, module+"/")) {
			return ""
		}
		return "not among the packages that it may know"
	}
	if slices.Contains(r.others, mod) {
		return ""
	}
	return "module " + mod + " is not among those that it may use"
}

// TestRefusals makes sure that the lattice refuses something.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		pkg, imp string
		standard bool
		mod      string
		refused  bool
	}{
		{"erofsfmt", "net/http", true, "", true},
		{"erofsfmt", "os", true, "", true},
		{"erofsfmt", "encoding/binary", true, "", false},
		{"registry", module + "/erofsfmt", false, module, true},
		{"registry/blobcache", module + "/registry", false, module, true},
		{"fusefs", module + "/erofsfmt", false, module, false},
		{"nbdserve", module + "/erofsfmt", false, module, true},
		{"backend", "github.com/urfave/cli/v2", false, "github.com/urfave/cli/v2", true},
	} {
		if got := lattice[c.pkg].refuses(c.imp, c.standard, c.mod) != ""; got != c.refused {
			t.Errorf("%s importing %s: refused %v, want %v", c.pkg, path.Base(c.imp), got, c.refused)
		}
	}
}
