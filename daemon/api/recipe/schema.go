package recipe

import (
	"maps"
	"reflect"
	"slices"
	"strings"
)

// schema is the type of each key, by its dotted name without indexes, as the
// tags of [Recipe] say.
var schema = func() map[string]reflect.Type {
	all := map[string]reflect.Type{}
	var walk func(prefix string, t reflect.Type)
	walk = func(prefix string, t reflect.Type) {
		for i := range t.NumField() {
			f := t.Field(i)
			tag := f.Tag.Get("mapstructure")
			if tag == "" {
				continue
			}
			name := join(prefix, tag)
			all[name] = f.Type
			switch {
			case isTable(f.Type):
				walk(name, f.Type)
			case isTables(f.Type):
				walk(name, f.Type.Elem())
			}
		}
	}
	walk("", reflect.TypeFor[Recipe]())
	return all
}()

// isTable reports whether t is written as [table].
func isTable(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(unmarshaler)
}

// isTables reports whether t is written as [[table]].
func isTables(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && isTable(t.Elem())
}

// typeName is what people call a value of type t.
func typeName(t reflect.Type) string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case isTables(t):
		return "a list of tables"
	case isTable(t):
		return "a table"
	case t.Kind() == reflect.Slice:
		return "a list of texts"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t == reflect.TypeFor[int]():
		return "a whole number"
	}
	return "a text in quotes"
}

// example is how a value of type t looks in a recipe.
func example(t reflect.Type) string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case isTables(t):
		return `[{ from = "a", to = "/b" }]`
	case isTable(t):
		return `{ key = "value" }`
	case t.Kind() == reflect.Slice:
		return `["a", "b"]`
	case t.Kind() == reflect.Bool:
		return "true"
	case t == reflect.TypeFor[int]():
		return "3"
	case t == reflect.TypeFor[Mode]():
		return `"0644"`
	case t == reflect.TypeFor[Owner]():
		return `"root:root"`
	case t == reflect.TypeFor[Size]():
		return `"512MiB"`
	}
	return `"text"`
}

// suggest says what may have been meant by a key that is not known in table, as
// the end of a sentence.
func suggest(key, table string) string {
	norm := func(s string) string {
		return strings.TrimSuffix(strings.ReplaceAll(strings.ToLower(s), "_", "-"), "s")
	}
	last := key[strings.LastIndexByte(key, '.')+1:]
	var here, elsewhere []string
	best, bestAt := "", 3
	for _, name := range slices.Sorted(maps.Keys(schema)) {
		in, leaf := "", name
		if i := strings.LastIndexByte(name, '.'); i >= 0 {
			in, leaf = name[:i], name[i+1:]
		}
		if in != table {
			if leaf == last {
				elsewhere = append(elsewhere, place(in))
			}
			continue
		}
		here = append(here, leaf)
		d := distance(norm(leaf), norm(key))
		if d < bestAt && d < len(leaf)/2 {
			best, bestAt = leaf, d
		}
	}
	switch {
	case len(elsewhere) > 0 && bestAt > 0:
		return "; it belongs " + strings.Join(elsewhere, " or ")
	case best != "":
		if t := schema[join(table, best)]; isTables(t) {
			best = "[[" + best + "]]"
		} else if isTable(t) {
			best = "[" + best + "]"
		}
		return "; do you mean " + best + "?"
	}
	return "; known are " + strings.Join(here, ", ")
}

// place is where the keys of a table stand.
func place(table string) string {
	switch {
	case table == "":
		return "above the first [table]"
	case isTables(schema[table]):
		return "under [[" + table + "]]"
	}
	return "under [" + table + "]"
}

// distance is how many letters must be put in, taken out or exchanged to make b
// of a, up to a length at which nobody means the one by the other.
func distance(a, b string) int {
	const most = 40
	if len(a) > most || len(b) > most {
		return most
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := before
			if a[i] != b[j] {
				cost = 1 + min(before, row[j], row[j+1])
			}
			before, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
