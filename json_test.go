package main

import (
	"encoding"
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/nbdserve"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// jsonFields are the fields of a type as encoding/json has them, each with its kind: what is nested behind the name of
// what it is in. A question mark says that a field may be missing.
func jsonFields(t *testing.T, of reflect.Type, below string) (fields []string) {
	t.Helper()
	for i := range of.NumField() {
		f := of.Field(i)
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && tag == "":
			fields = append(fields, jsonFields(t, f.Type, below)...)
			continue
		case tag == "" || tag == "-":
			t.Errorf("%v: the field %s has no name in JSON", of, f.Name)
			continue
		}
		inner, name := f.Type, below+tag
		if inner == reflect.TypeFor[json.RawMessage]() && name == "nbd" {
			inner = reflect.TypeFor[[]nbdserve.Attachment]()
		}
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Slice {
			inner, name = inner.Elem(), name+"[]"
		}
		missing := ""
		if options != "" {
			missing = "?"
		}
		kind := jsonKind(inner)
		fields = append(fields, name+missing+" "+kind)
		if kind == "object" && inner.Kind() == reflect.Struct {
			fields = append(fields, jsonFields(t, inner, name+".")...)
		}
	}
	return fields
}

func jsonKind(of reflect.Type) string {
	switch {
	case of == reflect.TypeFor[time.Time]():
		return "time"
	case of.Implements(reflect.TypeFor[encoding.TextMarshaler]()), of.Kind() == reflect.String:
		return "string"
	case of.Kind() == reflect.Bool:
		return "boolean"
	case of.Kind() >= reflect.Int && of.Kind() <= reflect.Float64:
		return "number"
	case of.Kind() == reflect.Struct, of.Kind() == reflect.Map:
		return "object"
	}
	return of.String()
}

// TestJSONDocumented: docs/commands.md has every field that --json prints, with its type, in the order of the structs.
func TestJSONDocumented(t *testing.T) {
	doc, err := os.ReadFile("docs/commands.md")
	must(t, err)
	_, section, found := strings.Cut(string(doc), "\n## JSON\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !found {
		t.Fatal("docs/commands.md has no section JSON")
	}
	row := regexp.MustCompile("(?m)^\\| `([^`]*)` \\| ([a-z]+) \\| .+ \\|$")
	for title, of := range map[string]reflect.Type{
		"cache ls":              reflect.TypeFor[blobcache.Kept](),
		"cache du":              reflect.TypeFor[blobcache.Usage](),
		"cache verify":          reflect.TypeFor[blobcache.Check](),
		"cache rm, cache prune": reflect.TypeFor[freedBytes](),
		"list":                  reflect.TypeFor[listed](),
	} {
		_, text, found := strings.Cut(section, "\n### "+title+"\n")
		text, _, _ = strings.Cut(text, "\n### ")
		var rows []string
		for _, r := range row.FindAllStringSubmatch(text, -1) {
			rows = append(rows, r[1]+" "+r[2])
		}
		if want := jsonFields(t, of, ""); !found || !slices.Equal(rows, want) {
			t.Errorf("%s: there are the rows\n%s\nand should be\n%s", title, strings.Join(rows, "\n"), strings.Join(want, "\n"))
		}
	}
}
